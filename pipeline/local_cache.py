"""Parts of remote files on this machine's disk: bounded, and shared by all of its processes.

    <sha256 of the key>.part            the bytes of a key; its modification time is when it was last asked for
    <sha256 of the key>-<random>.tmp    a part that is being written: as large as it will be, locked by its writer
    lock-<three digits>                 locked by whoever fetches a key of that hash: others wait for the bytes
    total                               how many bytes lie here; locked by whoever makes, renames or removes a file

A part is forced to the disk before it gets its name, nothing else is. Locks are flocks, which end with their process
however it ends. The total may be too high, where a process was killed or files were deleted, never too low: once it
reaches the limit, and after a restart of the machine, it is counted anew.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..schemas.errors import CacheError
from .places import user_cache_folder
from .storage import storage_errors

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 64 << 30
KEPT = 0.9  # eviction goes down to this share of the limit, so that it is seldom
TOTAL, TOTAL_BYTES = "total", 8
LOCK_DIGITS = 3
ATTEMPTS = 10  # to write into a folder that others keep deleting
WAIT_S = 0.01  # where the parts that others are writing fill the whole limit
_OURS = re.compile(r"[0-9a-f]{64}(\.part|-[0-9a-f]{8}\.tmp)")


class LocalCache:
    """Parts of remote files on this machine's disk: bounded, shared by its processes, deleted at any time unharmed.

    The sizes of its files never add up to more than `limit_bytes`; what was asked for longest ago makes room. Bytes
    that a reader has open stay until it closes them, as files without a name. `folder` is ``$XDG_CACHE_HOME`` (or
    ``~/.cache``) ``/tokenmill/parts`` of the machine that asks, unless given. Nothing is made before the first `open`,
    and nothing is held open: an instance can be pickled and forked.
    """

    def __init__(self, folder: str | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._folder = os.path.abspath(folder) if folder is not None else None
        self.limit_bytes = limit_bytes

    @property
    def folder(self) -> str:
        """Where the parts lie."""
        return self._folder or user_cache_folder("parts")

    def open(self, key: str, size: int, fetch: Callable[[], bytes]) -> int:
        """A read-only file descriptor of the `size` bytes of `key`, which the caller closes.

        They are read from the disk, or fetched and stored: once, however many ask. `fetch` returns verified bytes and
        opens nothing here; its errors pass through. CacheError where `size` is beyond the limit, StorageError where the
        folder cannot be written.
        """
        path = self._path(key)
        with storage_errors(path):
            descriptor = _open_part(path, size)
        if descriptor is not None:
            return descriptor
        if size > self.limit_bytes - TOTAL_BYTES:
            raise CacheError(
                f"{key}: {size} bytes, and the local cache {self.folder} may hold {self.limit_bytes}, {TOTAL_BYTES} of"
                f" them its own: give it a larger limit"
            )
        with self._locked(f"lock-{os.path.basename(path)[:LOCK_DIGITS]}"):
            with storage_errors(path):
                descriptor = _open_part(path, size)
            if descriptor is not None:
                return descriptor
            data = fetch()
            if len(data) != size:
                raise ValueError(f"{key}: {len(data)} bytes were fetched, {size} asked for")
            with storage_errors(self.folder):
                return self._store(path, data)

    def discard(self, key: str) -> None:
        """Forget the bytes of `key`, which turned out to be damaged."""
        with self._locked(TOTAL) as total, storage_errors(self.folder):
            self._write_total(total, self._read_total(total) - _remove(self._path(key)))

    def size_bytes(self) -> int:
        """The bytes of all files that lie in the folder now."""
        if not os.path.isdir(self.folder):
            return 0
        with self._locked(TOTAL), storage_errors(self.folder):
            return sum(part.size for part in self._files()) + TOTAL_BYTES

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, f"{hashlib.sha256(key.encode()).hexdigest()}.part")

    def _store(self, path: str, data: bytes) -> int:
        """Write the part `path`; its descriptor."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):  # the folder was deleted meanwhile
                return self._write(path, data)
        return self._write(path, data)

    def _write(self, path: str, data: bytes) -> int:
        writing, aside = self._reserve(path, len(data))
        reading = None
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(writing, left) :]
            os.fsync(writing)  # else a part could be zeros after a power failure
            reading = os.open(aside, os.O_RDONLY)  # before it can be evicted
            with self._locked(TOTAL):
                os.replace(aside, path)
            return reading
        except BaseException:
            if reading is not None:
                os.close(reading)
            with self._locked(TOTAL) as total:
                self._write_total(total, self._read_total(total) - _remove(aside))
            raise
        finally:
            _unlock(writing)

    def _reserve(self, path: str, size: int) -> tuple[int, str]:
        """A descriptor to write to and its file, which has `size` bytes and is locked; other parts make room."""
        aside = f"{path.removesuffix('.part')}-{uuid.uuid4().hex[:8]}.tmp"
        while True:
            with self._locked(TOTAL) as total:
                held = self._read_total(total) - _remove(path)  # of another size, else it had been opened
                if held + size > self.limit_bytes:
                    held = self._make_room(size)
                if held + size <= self.limit_bytes:
                    self._write_total(total, held + size)  # first: a process killed in between leaves it too high
                    return self._create(aside, size), aside
                self._write_total(total, held)
            time.sleep(WAIT_S)

    def _create(self, aside: str, size: int) -> int:
        writing = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _held.add(writing)
        try:
            fcntl.flock(writing, fcntl.LOCK_EX)
            os.ftruncate(writing, size)
        except BaseException:
            _unlock(writing)
            _remove(aside)
            raise
        return writing

    def _make_room(self, size: int) -> int:
        """Remove what killed processes left, then the parts asked for longest ago, until `size` bytes have room and
        more; returns the bytes that are left.
        """
        files = self._files()
        before = held = sum(file.size for file in files) + TOTAL_BYTES
        goal = min(int(KEPT * self.limit_bytes), self.limit_bytes - size)
        for file in sorted(files):
            if (file.is_part and held > goal) or (not file.is_part and _is_abandoned(file.path)):
                _remove(file.path)
                held -= file.size
        log.info("event=local_cache_evicted folder=%s bytes=%d left=%d", self.folder, before - held, held)
        return held

    def _files(self) -> list["_File"]:
        """The parts and those being written; who holds the lock of the total sees them all."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # deleted by hand
                        status = entry.stat()
                        is_part = entry.name.endswith(".part")
                        found.append(_File(is_part, status.st_mtime_ns, status.st_size, entry.path))
        return found

    def _read_total(self, total: int) -> int:
        stored, booted_s = os.pread(total, TOTAL_BYTES, 0), time.time() - time.monotonic()
        # One from before the machine started may be older than the files: only parts are forced to the disk.
        if len(stored) == TOTAL_BYTES and os.fstat(total).st_mtime > booted_s:
            return int.from_bytes(stored, "little")
        return sum(file.size for file in self._files()) + TOTAL_BYTES

    def _write_total(self, total: int, size_bytes: int) -> None:
        os.pwrite(total, max(size_bytes, TOTAL_BYTES).to_bytes(TOTAL_BYTES, "little"), 0)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """A descriptor of the file `name`, which no other process or thread has locked."""
        with storage_errors(self.folder):
            descriptor = _lock(os.path.join(self.folder, name))
        try:
            yield descriptor
        finally:
            _unlock(descriptor)


class _File(NamedTuple):
    """A file of a local cache; in order, those being written come first and then the parts by when they were used."""

    is_part: bool
    modified_ns: int
    size: int
    path: str


# Descriptors with locks. A process that is forked meanwhile must not keep them locked when this one is killed.
_held: set[int] = set()


def _forget_held() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_held)


def _lock(path: str) -> int:
    """A descriptor of the file `path`, made if it is absent, once no one else has it locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            continue
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            _unlock(descriptor)
            raise
        _unlock(descriptor)  # the folder was deleted while this process waited: another may hold the new file


def _unlock(descriptor: int) -> None:
    _held.discard(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a fork has a copy
    os.close(descriptor)


def _open_part(path: str, size: int) -> int | None:
    """The part `path`, open and marked as used; None where it is absent or of another size."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        return None
    now_ns = time.time_ns()
    with contextlib.suppress(OSError):  # another user's, or a read-only disk: it can be read all the same
        os.utime(descriptor, ns=(now_ns, now_ns))
    return descriptor


def _remove(path: str) -> int:
    """Remove a file; how many bytes it had, 0 where there was none."""
    try:
        size = os.stat(path).st_size
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return size


def _is_abandoned(path: str) -> bool:
    """Whether the process that was writing this file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
