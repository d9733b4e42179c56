"""Processes forked from one that has imported what they need: libraries load once, not for every child and death."""

import atexit
import contextlib
import ctypes
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LAUNCH = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]);"
    "from tokenmill.pipeline.zygote import main; main(int(sys.argv[1]))"
)
PATIENCE_S = 5.0
PR_SET_PDEATHSIG = 1
LENGTH, NUMBER = struct.Struct("<Q"), struct.Struct("<i")


class Forked:
    """A child of the zygote, seen from here. `returncode` is minus the signal that killed it, as in subprocess."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid, self.returncode = pid, None
        self._status = status
        self._lock = threading.Lock()
        # The zygote reaps its children: a file descriptor, unlike a number, never means another process.
        self._pidfd = -1
        with contextlib.suppress(ProcessLookupError, AttributeError):  # gone already, or a system without them
            self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The return code, None while it lives."""
        return self.wait(0)

    def wait(self, timeout_s: float) -> int | None:
        """The return code, None where it still lives after the time; a child whose zygote died was killed."""
        with self._lock:
            if self.returncode is None and self._has_news(timeout_s):
                data = self._status.recv(NUMBER.size)
                if not data:
                    self._signal_kill()
                self.returncode = NUMBER.unpack(data)[0] if data else -signal.SIGKILL
                self._status.close()
                if self._pidfd >= 0:
                    os.close(self._pidfd)
                    self._pidfd = -1
            return self.returncode

    def kill(self) -> None:
        """End it now."""
        with self._lock:
            self._signal_kill()

    def _has_news(self, timeout_s: float) -> bool:
        news = select.poll()  # select refuses the high numbers that files have in a process with many
        news.register(self._status, select.POLLIN)
        return bool(news.poll(timeout_s * 1000))

    def _signal_kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif not hasattr(os, "pidfd_open") and self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """The process that children are forked from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C in a terminal is for the parent, which may want to finish its shard.
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control = ours
        self._lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether it can fork."""
        return self._process.poll() is None

    def fork(self, function: bytes, stream: socket.socket, log: int) -> Forked:
        """A process that serves at `stream` and writes to the file `log`; ConnectionError where the zygote has died.

        `function` is pickled: the zygote imports what it names before it forks.
        """
        status, theirs = socket.socketpair()
        request = pickle.dumps((function, dict(os.environ), os.getcwd(), list(sys.path)))
        data = b""
        with self._lock, theirs, contextlib.suppress(OSError):
            socket.send_fds(self._control, [LENGTH.pack(len(request))], [stream.fileno(), log, theirs.fileno()])
            self._control.sendall(request)
        with contextlib.suppress(OSError):
            data = status.recv(NUMBER.size)
        if not data:
            status.close()
            self.close()  # so that nobody asks it again
            raise ConnectionError("the process that decoders are forked from has ended")
        return Forked(NUMBER.unpack(data)[0], status)

    def close(self) -> None:
        """End it, and with it its children."""
        self._control.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_zygotes: dict[tuple[int, str | None], Zygote] = {}
_lock = threading.Lock()


def zygote() -> Zygote:
    """The zygote of this process, started when it is first asked for."""
    key = os.getpid(), os.environ.get("PYTHONPATH")  # which Python reads once, at its start
    with _lock:
        found = _zygotes.get(key)
        if found is not None and not found.is_alive:
            found.close()
            found = None
        if found is None:
            if not _zygotes:
                atexit.register(_close_all)
            found = _zygotes[key] = Zygote()
        return found


def fork(function: bytes, stream: socket.socket, log: int) -> Forked:
    """As `Zygote.fork`, by another zygote where the first was killed, which shows only when it is asked."""
    try:
        return zygote().fork(function, stream, log)
    except ConnectionError:
        return zygote().fork(function, stream, log)


def _close_all() -> None:
    for (pid, _), one in _zygotes.items():
        if pid == os.getpid():
            one.close()


def main(descriptor: int) -> None:
    """The life of a zygote: fork on request, tell how children ended, end with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):  # asked of the parent, which decides
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    control = socket.socket(fileno=descriptor)
    children: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([control, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _reap(children)
        if control in readable:
            serve = _fork(control, children)
            if serve is not None:  # this is the child
                for other in (woken, wake):
                    os.close(other)
                control.close()
                serve()
                os._exit(0)  # without waiting for threads of decoders


def _reap(children: dict[int, socket.socket]) -> None:
    """Tell the parent of children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as told, contextlib.suppress(OSError):
            told.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _fork(control: socket.socket, children: dict[int, socket.socket]) -> Callable[[], None] | None:
    """Read a request and fork: what the child is to do, None in the zygote itself."""
    head, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, 3)
    if not head:
        os._exit(0)
    function, environment, folder, paths = pickle.loads(_read(control, LENGTH.unpack(head)[0]))
    sys.path[:] = paths
    with contextlib.suppress(Exception):  # the child will fail at it in its turn, and say so
        pickle.loads(function)
    stream, log, status = descriptors
    told = socket.socket(fileno=status)
    pid = os.fork()
    if pid:
        children[pid] = told
        told.sendall(NUMBER.pack(pid))
        os.close(stream)
        os.close(log)
        return None
    told.close()
    for other in children.values():
        other.close()
    return lambda: _become_child(stream, log, environment, folder)


def _become_child(stream: int, log: int, environment: dict[str, str], folder: str) -> None:
    from .isolation import serve

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    _end_with_zygote(os.getppid())
    serve(socket.socket(fileno=stream))


def _end_with_zygote(parent: int) -> None:
    """Die with the zygote: by the kernel where it can, since a decoder that hangs may hold Python's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch_parent, args=(parent,), name="parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _read(stream: socket.socket, size: int) -> Any:
    data = bytearray()
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            os._exit(0)
        data += part
    return bytes(data)
