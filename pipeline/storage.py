"""A folder of the cache: whole files, published or created at once, locally or in an object store."""

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..schemas.digest import digest_of_stream
from ..schemas.errors import StorageError
from ..schemas.shard import SHORT_DIGEST, FileEntry
from .places import STORE_LIBRARIES

STAGING = ".staging"


class Folder:
    """A folder at any fsspec URL, whose files appear whole or not at all."""

    def __init__(self, url: str) -> None:
        try:
            with storage_errors(url):
                self.fs, root = fsspec.core.url_to_fs(url)
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
            self.fs.invalidate_cache()
            found = self.fs.find(self.path(prefix))
        return sorted(path[len(self.root) + 1 :] for path in map(str, found))

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists: True for the one writer that made it, False for all others."""
        with storage_errors(self.uri(name)):
            if not self.is_local:
                return self._create_object(name, data)
            with self._aside(name, data) as aside:
                try:
                    os.link(aside, self.path(name))
                except FileExistsError:
                    return False
                _sync_folder(self.path(name))
                return True

    def replace(self, name: str, data: bytes) -> None:
        """Write `name`, in place of what was there."""
        with storage_errors(self.uri(name)):
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
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
        with storage_errors(self.uri(name)):
            if self.is_local:
                _sync_file(local_path)
                os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
                os.replace(local_path, self.path(name))
                _sync_folder(self.path(name))
            else:
                self.fs.put_file(local_path, self.path(name))
        return entry

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A folder of this process for unfinished files: on the cache's own disk where the cache is local."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="tokenmill-") as folder:
                yield folder
            return
        with storage_errors(self.url):
            place = self.path(f"{STAGING}/{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
            os.makedirs(place)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(self.path(STAGING))

    def _create_object(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Some S3 servers answer a lost race (412) with a code that s3fs maps to EINVAL.
            if error.errno != errno.EINVAL or not self.fs.exists(self.path(name)):
                raise
            return False
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
        if number is None:  # object stores raise these without a number
            number = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(type(error))
        remedy = REMEDIES.get(number or 0) or " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{place}: {remedy}") from error
