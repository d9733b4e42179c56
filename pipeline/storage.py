"""A folder of the cache: whole files, published or created at once, locally or in an object store."""

import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from ..schemas.digest import digest_of_stream
from ..schemas.errors import StorageError
from ..schemas.shard import SHORT_DIGEST, FileEntry
from .places import STORE_LIBRARIES, filesystem_of, said_by
from .retries import Attempts, HalfWritten, RetryPolicy, answer_of

log = logging.getLogger(__name__)

STAGING = ".staging"
NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# Stores whose fsspec library sends create-if-absent as one request; the others look first and then write.
CREATING_PROTOCOLS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
UPLOADS = RetryPolicy(attempts=3, total_s=3600)  # each of them is many requests, which are retried on their own
MODIFIED_KEYS = ("LastModified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file of a folder as its store lists it; `modified_s` is Unix time, and now where the store does not tell."""

    name: str
    size_bytes: int
    modified_s: float


class Folder:
    """A folder at any fsspec URL, whose files appear whole or not at all."""

    def __init__(self, url: str) -> None:
        try:
            with storage_errors(url):
                self.fs, root = filesystem_of(url)
        except (ValueError, ImportError) as error:
            raise StorageError(f"{url}: {error}: accepted are local paths and URLs such as s3://bucket/key") from None
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local and os.path.isfile(self.root):
            raise StorageError(f"{url}: it is a file, a folder is wanted: choose another place")
        if "*" in self.root or "?" in self.root:
            raise StorageError(
                f"{url}: a folder with * or ? in its path would be read as a pattern: choose another place"
            )
        self.url = self.root if self.is_local else self.fs.unstrip_protocol(self.root)

    def path(self, name: str) -> str:
        """The path of `name` on this folder's filesystem."""
        return f"{self.root}/{name}"

    def uri(self, name: str) -> str:
        """The URL of `name` as any process can open it."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file `name` is there."""
        with storage_errors(self.uri(name)):
            return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """The whole of file `name`."""
        with storage_errors(self.uri(name)):
            return self.fs.cat_file(self.path(name))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file `name`, open for reading."""
        with storage_errors(self.uri(name)), self.fs.open(self.path(name), "rb") as stream:
            yield stream  # pyright: ignore[reportReturnType]

    def list(self, prefix: str) -> list[str]:
        """The names of all files below the folder `prefix`, sorted; none where it does not exist."""
        with storage_errors(self.uri(prefix)):
            paths = _local_files(self.path(prefix)) if self.is_local else self._objects(prefix)
            return sorted(path[len(self.root) + 1 :] for path in paths)

    def find(self, prefix: str) -> "list[FoundFile]":
        """All files below the folder `prefix`, by name; none where it does not exist."""
        with storage_errors(self.uri(prefix)):
            if self.is_local:
                found = [found for path in _local_files(self.path(prefix)) if (found := self._stat(path))]
            else:
                found = [self._listed(path, info) for path, info in self._objects(prefix).items()]
        return sorted(found, key=lambda file: file.name)

    def remove(self, name: str) -> None:
        """Remove the file `name`; one that is gone already is no error."""
        with storage_errors(self.uri(name)), contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.path(name))
            else:
                self.fs.rm_file(self.path(name))

    def can_create(self) -> bool:
        """Whether `create` is exact here, however many race; tried out with a file of a random name.

        Where it is not (file systems without hard links, object stores that ignore If-None-Match), one process
        alone may commit, with `create_unguarded`.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        if self.is_local:
            with storage_errors(self.url), self._aside(probe, b"") as aside:
                return self._link(aside, f"{aside}.link")
        if not CREATING_PROTOCOLS.intersection(self._protocols()):
            return False
        try:
            return self.create(probe, b"first") and not self.create(probe, b"second")
        finally:
            self.remove(probe)

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists: True for the one writer that made it, False for all others.

        In an object store, writers of the same bytes may all be told True: a writer whose answer was lost knows
        its file by its bytes.
        """
        with storage_errors(self.uri(name)):
            if not self.is_local:
                return self._create_object(name, data)
            with self._aside(name, data) as aside:
                try:
                    os.link(aside, self.path(name))
                except FileExistsError:
                    return os.stat(aside).st_nlink > 1  # ours, where a network file system repeated the request
                except OSError as error:
                    if error.errno not in NO_HARD_LINKS:
                        raise
                    return self._create_exclusively(name, data)
                _sync_folder(self.path(name))
                return True

    def create_unguarded(self, name: str, data: bytes) -> bool:
        """What `create` does, where no other process may be writing `name`."""
        if self.exists(name):
            return False
        self.replace(name, data)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Write `name`, in place of what was there."""
        with storage_errors(self.uri(name)):
            if not self.is_local:
                self._upload(name, len(data), lambda: self.fs.pipe_file(self.path(name), data))
                return
            with self._aside(name, data) as aside:
                os.replace(aside, self.path(name))
                _sync_folder(self.path(name))

    def publish(self, local_path: str, prefix: str, num_rows: int) -> FileEntry:
        """Move a finished local file to ``<prefix>-<digest><suffix>``; publishing the same bytes twice is one file."""
        with open(local_path, "rb") as stream:
            sha256, size_bytes = digest_of_stream(stream)
        name = f"{prefix}-{sha256[:SHORT_DIGEST]}{os.path.splitext(local_path)[1]}"
        entry = FileEntry(name=name, size_bytes=size_bytes, sha256=sha256, num_rows=num_rows)
        self.put(local_path, name)
        return entry

    def put(self, local_path: str, name: str) -> None:
        """Move a finished local file to `name`, in place of what was there; it appears whole."""
        with storage_errors(self.uri(name)):
            if self.is_local:
                _sync_file(local_path)
                os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
                os.replace(local_path, self.path(name))
                _sync_folder(self.path(name))
            else:
                size_bytes = os.path.getsize(local_path)
                self._upload(name, size_bytes, lambda: self._put_file(local_path, name, size_bytes))

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A folder of this process for unfinished files: on the cache's own disk where the cache is local."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="tokenmill-") as folder:
                yield folder
            return
        with storage_errors(self.url):
            place = self.path(f"{STAGING}/{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
            while True:
                with contextlib.suppress(FileNotFoundError):  # another writer has just removed the empty parent
                    os.makedirs(place)
                    break
                os.makedirs(self.root, exist_ok=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(self.path(STAGING))

    def remove_empty_staging(self, older_than_s: float) -> None:
        """Remove the staging folders of processes that were killed before they had written a file there."""
        if not self.is_local:
            return
        with contextlib.suppress(OSError):  # not empty, or removed by another
            for place in os.scandir(self.path(STAGING)):
                if place.stat().st_mtime <= time.time() - older_than_s:
                    with contextlib.suppress(OSError):
                        os.rmdir(place)
            os.rmdir(self.path(STAGING))

    def _protocols(self) -> set[str]:
        protocol = self.fs.protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    def _create_object(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except OSError as error:
            if not isinstance(error, FileExistsError) and answer_of(error)[0] != 412:
                raise
            # Ours, if the first answer was lost: aiohttp and our retries make the request again.
            with contextlib.suppress(FileNotFoundError):
                return self.fs.cat_file(self.path(name)) == data
            return False
        if self._size(name) != len(data):
            self._upload(name, len(data), lambda: self.fs.pipe_file(self.path(name), data))
        return True

    def _upload(self, name: str, size_bytes: int, put: Callable[[], object]) -> None:
        """Run `put` until the store holds all `size_bytes` of `name`; never leave it there in part."""
        attempts = Attempts(f"upload {self.uri(name)}", UPLOADS)
        while True:
            put()
            found = self._size(name)
            if found == size_bytes:
                return
            try:
                wait_s = attempts.wait_after(HalfWritten(f"the store holds {found} of {size_bytes} bytes sent"))
            except HalfWritten:
                self.remove(name)
                raise
            time.sleep(wait_s)

    def _put_file(self, local_path: str, name: str, size_bytes: int) -> None:
        try:
            self.fs.put_file(local_path, self.path(name))
        except FileNotFoundError:  # S3 says so of a multipart upload that is complete, if the answer was lost
            if self._size(name) != size_bytes:
                raise

    def _size(self, name: str) -> int | None:
        """The size of an object as the store has it now; None where there is none."""
        try:
            self.fs.invalidate_cache()
            return self.fs.info(self.path(name))["size"]
        except FileNotFoundError:
            return None

    def _objects(self, prefix: str) -> dict[str, Any]:
        """What an object store lists of the files below `prefix`, by path."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.path(prefix), detail=True)
        return {str(path): info for path, info in found.items() if not path.endswith("/")}

    def _listed(self, path: str, info: dict[str, Any]) -> FoundFile:
        modified = next((info[key] for key in MODIFIED_KEYS if info.get(key)), time.time())
        if isinstance(modified, str):
            modified = datetime.fromisoformat(modified)
        modified_s = modified.timestamp() if isinstance(modified, datetime) else float(modified)
        return FoundFile(name=path[len(self.root) + 1 :], size_bytes=info["size"], modified_s=modified_s)

    def _stat(self, path: str) -> FoundFile | None:
        """A local file; None where it was removed since it was listed."""
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        return FoundFile(name=path[len(self.root) + 1 :], size_bytes=status.st_size, modified_s=status.st_mtime)

    def _link(self, aside: str, target: str) -> bool:
        """Whether this file system has hard links: `target` is made and removed."""
        try:
            os.link(aside, target)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            return False
        os.unlink(target)
        return True

    def _create_exclusively(self, name: str, data: bytes) -> bool:
        """The next best without hard links: exact too, but a power cut in the middle leaves a part of the file."""
        target = self.path(name)
        try:
            stream = open(target, "xb")
        except FileExistsError:
            return False
        try:
            with stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            os.unlink(target)
            raise
        _sync_folder(target)
        return True

    @contextlib.contextmanager
    def _aside(self, name: str, data: bytes) -> Iterator[str]:
        """A synced file with `data` beside `name`, removed on exit if it is still there."""
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        aside = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"
        try:
            with open(aside, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield aside
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)


def _local_files(folder: str) -> Iterator[str]:
    """The paths of all files below a local folder, without asking for anything but names."""

    def raise_if_unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for place, _, names in os.walk(folder.rstrip("/"), onerror=raise_if_unreadable, followlinks=True):
        yield from (f"{place}/{name}" for name in names)


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[str]:
    """A path beside the local file `path` to write to: it takes the file's place at the end, and only then."""
    aside = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex[:8]}.{os.path.basename(path)}")
    with storage_errors(path):
        try:
            yield aside
            os.replace(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)


def _sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    _sync_file(os.path.dirname(path))


REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run again, what was committed is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run again, what was committed is kept",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EACCES: "permission denied: choose another place, or change its owner or mode",
    errno.EPERM: "operation not permitted: choose another place, or change its owner or mode",
    errno.ENOENT: "no such file: check the path",
    errno.EEXIST: "a file of that name is in the way: choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
    errno.EISDIR: "it is a folder, a file was expected: choose another place",
}


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what an operating system or object store says of `place` into a StorageError with a remedy."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in STORE_LIBRARIES:
            raise
        number = error.errno if isinstance(error, OSError) else None
        if number is None and isinstance(error, FileNotFoundError) and answer_of(error)[1] != "NoSuchBucket":
            number = errno.ENOENT  # object stores raise it without a number
        remedy = REMEDIES.get(number or 0) or said_by(error)
        if number is None and isinstance(error, PermissionError):
            remedy = f"permission denied ({remedy}): check the credentials, and what they may do there"
        raise StorageError(f"{place}: {remedy}") from error
