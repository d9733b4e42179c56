"""Work in a process of its own, which may crash, hang or eat memory without harm to anything else.

The parent sends a job, the child streams values back; the child has nothing else to keep. The parent knows which job
the child is at, so every death has a name. Values cross a socket pair: arrays out of band, without being pickled.
"""

import contextlib
import faulthandler
import logging
import os
import pickle
import signal
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, Literal

from ..schemas.errors import TokenmillError
from .retries import add_retries, retry_counts
from .zygote import Forked, fork

log = logging.getLogger(__name__)

# Runs a job: called in the child with what the parent sent, its values are sent back one by one.
Serve = Callable[[Any], Iterator[Any]]

OWN_STRIKES = 2  # deaths on one job that are its own fault
OUTSIDE_STRIKES = 5  # deaths by a signal that somebody else sent: an operator, or the kernel short of memory
WATCH_EVERY_S = 0.1
SOCKET_BYTES = 2 << 20
LOG_TAIL_BYTES = 2000
HEAD = struct.Struct("<IQ")
PATIENCE_S = 5.0


class ChildDied(Exception):
    """The child ended in the middle of a job. `outside` says that it was killed by somebody else."""

    def __init__(self, reason: str, log_tail: str, *, outside: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.log_tail, self.outside = reason, log_tail, outside


class Poison(Exception):
    """A job that killed its child once too often: `attempts` times, `reason` says how."""

    def __init__(self, reason: str, attempts: int, log_tail: str) -> None:
        super().__init__(reason)
        self.reason, self.attempts, self.log_tail = reason, attempts, log_tail


class Child:
    """One child process, started with its first job and again after each death.

    `make_serve` is called in the child, once. The child is killed when it holds more than `memory_mb`; one that has
    grown past half of it is replaced between two jobs, since decoders leak.
    """

    def __init__(self, make_serve: Callable[[], Serve], memory_mb: int) -> None:
        self._make_serve, self._memory_bytes = make_serve, memory_mb << 20
        self._process: Forked | None = None
        self._socket: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._verdict = ""
        self._left_s: float | None = None  # how long the parent may still wait
        self._is_awaited = False
        self._is_closed = False
        self._starting = threading.Lock()

    def stream(self, job: Any) -> Generator[Any, None, None]:
        """The values of `job` as they come; errors raised by the job are raised here, ChildDied where it died."""
        self._left_s = None
        with self._starting:
            is_new = self._start()
        try:
            if is_new:
                self._hand_over()
            self._send(job)
            while True:
                kind, value = self._receive()
                if kind == "end":
                    break
                if kind == "retries":
                    add_retries(value)
                    continue
                if kind == "error":
                    raise value
                if kind == "bug":
                    raise ChildDied(f"the decoder raised {value.splitlines()[-1]}", value[-LOG_TAIL_BYTES:])
                yield value
        except (EOFError, OSError):
            raise self._death() from None
        except BaseException:  # closed early, or a job that broke off: the child may be in the middle of it
            self._kill()
            raise
        if self._process is not None and resident_bytes(self._process.pid) > self._memory_bytes // 2:
            log.info("event=child_replaced pid=%d", self._process.pid)
            self._kill()

    def allow_s(self, seconds: float) -> None:
        """From now on the current job may keep the parent waiting for so many seconds in all."""
        self._left_s = seconds

    def close(self) -> None:
        """End the child, also from another thread that is waiting for it; it will not start again."""
        self._is_closed = True
        with self._starting:
            self._kill()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def _start(self) -> bool:
        """Make sure that a child is there; True where it is a new one."""
        if self._is_closed:
            raise ChildDied("closed", "", outside=True)
        if self._process is not None and self._process.poll() is None:
            assert self._log is not None
            self._log.truncate(0)
            return False
        self._kill()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._log, self._verdict, self._socket = tempfile.TemporaryFile("ab+"), "", ours
        with theirs:
            function = pickle.dumps(self._make_serve)
            try:
                self._process = fork(function, theirs, self._log.fileno())
            except ConnectionError as error:  # killed by somebody else
                raise ChildDied(str(error), "", outside=True) from None
        threading.Thread(target=self._watch, args=(self._process,), name="watch-child", daemon=True).start()
        return True

    def _hand_over(self) -> None:
        """Tell a new child what it serves. One that cannot even begin is no fault of any video."""
        try:
            self._send(self._make_serve)
            self._receive()
        except (EOFError, OSError):
            death = self._death()
            if death.outside:
                raise death from None
            said = " ".join(death.log_tail.split())[-500:]
            raise TokenmillError(f"a decoder process could not start ({death.reason}): {said}") from None

    def _watch(self, process: Forked) -> None:
        """Kill the child when it keeps the parent waiting too long, or holds too much memory."""
        last_s = time.monotonic()
        while process.poll() is None:
            time.sleep(WATCH_EVERY_S)
            now_s = time.monotonic()
            waited_s, last_s = now_s - last_s, now_s
            if process.poll() is not None:
                return
            if self._is_awaited and self._left_s is not None:
                self._left_s -= waited_s
                if self._left_s <= 0:
                    self._verdict = "time-out: killed after the time that one video may take (decode.timeout_s)"
            if resident_bytes(process.pid) > self._memory_bytes:
                self._verdict = f"memory: killed with more than {self._memory_bytes >> 20} MB (decode.memory_mb)"
            if self._verdict:
                process.kill()

    def _send(self, value: Any) -> None:
        send(self._open_socket(), value)

    def _open_socket(self) -> socket.socket:
        if self._socket is None:  # closed by another thread
            raise EOFError
        return self._socket

    def _receive(self) -> tuple[str, Any]:
        self._is_awaited = True
        try:
            return receive(self._open_socket())
        finally:
            self._is_awaited = False

    def _death(self) -> ChildDied:
        """Why the child is gone."""
        process, verdict = self._process, self._verdict
        if process is None or self._is_closed:
            return ChildDied("closed", "", outside=True)
        process.wait(PATIENCE_S)
        verdict = verdict or self._verdict
        assert self._log is not None
        tail = _tail_of(self._log)
        self._kill()
        code = process.returncode
        if verdict:
            return ChildDied(verdict, tail)
        if code is not None and code < 0:
            outside = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
            by = " (by hand, or by a system short of memory)" if outside else ""
            return ChildDied(f"signal: died of {signal.Signals(-code).name}{by}", tail, outside=outside)
        return ChildDied(f"exit: ended with code {code}", tail)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(PATIENCE_S)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is reading
            self._socket.close()
        if self._log is not None:
            self._log.close()
        self._socket = self._log = None


def resident_bytes(pid: int | Literal["self"] = "self") -> int:
    """How much memory a process holds; 0 where it has ended, or the system has no /proc."""
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _tail_of(written: IO[bytes]) -> str:
    """The end of what a child wrote, without the list of modules that Python adds to every crash."""
    size = written.seek(0, os.SEEK_END)
    written.seek(max(0, size - 8 * LOG_TAIL_BYTES))
    lines = written.read().decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if not line.startswith("Extension modules:"))[-LOG_TAIL_BYTES:]


def stream_with_strikes(child: Child, name: str, remaining: Callable[[], Any]) -> Generator[Any, None, None]:
    """The values of the job that `remaining` gives, asked anew after every death of the child; Poison at the last.

    `name` is what the job is about, for the log.
    """
    own = outside = 0
    while True:
        try:
            yield from child.stream(remaining())
            return
        except ChildDied as death:
            if child.is_closed:
                raise
            own, outside = own + (not death.outside), outside + death.outside
            log.warning("event=decoder_died video=%s reason=%r attempt=%d", name, death.reason, own + outside)
            if own >= OWN_STRIKES or outside >= OUTSIDE_STRIKES:
                raise Poison(death.reason, own + outside, death.log_tail) from None


def send(stream: socket.socket, value: Any) -> None:
    """Write one pickled value, its arrays behind it as they lie in memory."""
    buffers: list[memoryview] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    sizes = struct.pack(f"<{len(buffers)}Q", *map(len, buffers))
    stream.sendall(HEAD.pack(len(buffers), len(data)) + sizes + data)
    for buffer in buffers:
        stream.sendall(buffer)


def receive(stream: socket.socket) -> Any:
    """The next value that was sent; EOFError at the end of the stream."""
    num_buffers, size = HEAD.unpack(_read(stream, HEAD.size))
    sizes = struct.unpack(f"<{num_buffers}Q", _read(stream, 8 * num_buffers))
    data = _read(stream, size)
    return pickle.loads(data, buffers=[_read(stream, size) for size in sizes])


def _read(stream: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        num_read = stream.recv_into(rest)
        if not num_read:
            raise EOFError
        rest = rest[num_read:]
    return data


def serve(stream: socket.socket) -> None:
    """The life of a child: answer jobs until the parent is gone."""
    faulthandler.enable(all_threads=False)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    try:
        run_job = receive(stream)()
    except EOFError:
        return
    except Exception:
        traceback.print_exc()
        os._exit(1)
    send(stream, ("ready", None))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _answer(stream, run_job, receive(stream))


def _answer(stream: socket.socket, run_job: Serve, job: Any) -> None:
    """Send the values of one job, what it took more than one request for, and how it ended."""
    retries, end = retry_counts(), ("end", None)
    try:
        for value in run_job(job):
            send(stream, ("value", value))
    except ConnectionError:
        raise
    except TokenmillError as error:
        end = "error", error
    except MemoryError:
        end = "bug", "MemoryError"
    except Exception:
        end = "bug", traceback.format_exc().rstrip()
    send(stream, ("retries", retry_counts() - retries))
    send(stream, end)
