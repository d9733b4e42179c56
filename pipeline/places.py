"""Places: which files are at a path or URL, what is said of them, and names for videos inside one."""

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from ..schemas.errors import SourceError, TokenmillError

MISSING = "missing"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(://|::)")
STORE_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"}
CHANGE_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as its store lists it: absolute path or URL, stamp (see SOURCE_SCHEMA) and size in bytes.

    The stamp is ``missing`` where there is no such file, and empty where the store tells too little to notice
    a change.
    """

    uri: str
    stamp: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """A video that is `size_bytes` of an uncompressed tar, from `offset` on."""

    file_uri: str
    name: str
    offset: int
    size_bytes: int

    @property
    def uri(self) -> str:
        """The tar's URI, and the member in a fragment."""
        member = quote(self.name, safe="/")
        return f"{self.file_uri}#member={member}&offset={self.offset}&size={self.size_bytes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetCell:
    """A video that is row `row` (from 0) of a binary column of a Parquet file."""

    file_uri: str
    column: str
    row: int


MEMBER = re.compile(r"(.+)#member=([^#&]*)&offset=(\d+)&size=(\d+)", re.DOTALL)
CELL = re.compile(r"(.+)#column=([^#&]*)&row=(\d+)", re.DOTALL)


def video_inside(uri: str) -> TarMember | ParquetCell | None:
    """The part of a larger file that `uri` names, or None where it names a whole file."""
    local = local_path(uri)
    if "#" not in uri or (local is not None and os.path.exists(local)):
        return None
    if match := MEMBER.fullmatch(uri):
        name, offset, size = unquote(match[2]), int(match[3]), int(match[4])
        return TarMember(file_uri=match[1], name=name, offset=offset, size_bytes=size)
    if match := CELL.fullmatch(uri):
        return ParquetCell(file_uri=match[1], column=unquote(match[2]), row=int(match[3]))
    return None


def cell_uri_prefix(file_uri: str, column: str) -> str:
    """What the row number follows in the URI of a video in a Parquet column."""
    return f"{file_uri}#column={quote(column, safe='')}&row="


def local_path(url: str) -> str | None:
    """`url` as an absolute path of this machine, or None where another store holds it."""
    if url.startswith(("file://", "local://")):
        url = url.partition("://")[2]
    elif URL.match(url):
        return None
    return os.path.abspath(os.path.expanduser(url))


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url`, and its path on it: S3 with our own retries, and without a memory of listings."""
    if url.startswith(("s3://", "s3a://")):
        from .retried_s3 import RetriedS3  # s3fs takes most of a second to import

        return RetriedS3(use_listings_cache=False), str(RetriedS3._strip_protocol(url))
    return fsspec.core.url_to_fs(url)


def open_store(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url`, and its path on it; SourceError where no store has such URLs."""
    local = local_path(url)
    with read_errors(url):
        if local is not None:
            return fsspec.filesystem("file"), local
        try:
            filesystem, path = filesystem_of(url)
        except ValueError as error:
            raise SourceError(f"{url}: {error}: accepted are local paths and URLs such as s3://bucket/key") from None
    return filesystem, path


@contextlib.contextmanager
def read_errors(place: str) -> Iterator[None]:
    """Turn what a store says when `place` cannot be read into a SourceError of one line, with a remedy."""
    try:
        yield
    except TokenmillError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, ValueError, ImportError)) and library not in STORE_LIBRARIES:
            raise
        raise SourceError(f"{place}: {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist: check the path"
    if isinstance(error, PermissionError):
        return "permission denied: change its owner or mode, or in an object store the credentials"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, a file was expected: name a file"
    if "Credentials" in type(error).__name__:
        return "no credentials for the store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    return said_by(error)


def said_by(error: BaseException) -> str:
    """What a library says of its error, in one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "; ".join([" ".join(text.split()), *getattr(error, "__notes__", ())])


def stored_file(uri: str) -> StoredFile:
    """What the store says of the file at `uri`, or of the larger file that holds it, without reading it."""
    inside = video_inside(uri)
    holder = inside.file_uri if inside else uri
    try:
        local = local_path(holder)
        if local is not None:
            file = _local_file(local)
        else:
            filesystem, path = open_store(holder)
            with read_errors(holder):
                file = _listed(holder, filesystem.info(path))
    except SourceError as error:
        absent = isinstance(error.__cause__, FileNotFoundError)
        return StoredFile(uri=uri, stamp=MISSING if absent else "", size_bytes=None)
    return StoredFile(uri=uri, stamp=file.stamp, size_bytes=None if inside else file.size_bytes)


def files_at(path: str, extensions: tuple[str, ...]) -> list[StoredFile]:
    """The files at `path`, by URI: one file, all that a glob matches, or those in a folder with an extension.

    Hidden files and folders are left out unless the path itself names them; links to folders are not
    followed. Extensions are compared without regard to case. SourceError says why there are none.
    """
    if "::" in path and local_path(path) is None:
        raise SourceError(f"{path}: chained URLs cannot be listed: unpack the files, or list them in a table")
    filesystem, root = open_store(path)
    with read_errors(path):
        filesystem.invalidate_cache()
        try:
            kind = filesystem.info(root)["type"]
        except FileNotFoundError:
            if not has_magic(root):
                raise
            return _glob(filesystem, root, path)
        if kind != "directory":
            return [stored_file(_uri(filesystem, root))]
        return _folder(filesystem, root, path, extensions)


def _glob(filesystem: Any, root: str, path: str) -> list[StoredFile]:
    """The files that the glob `root` matches."""
    matches = filesystem.glob(root, detail=True)
    found = [
        _listed(_uri(filesystem, name), info)
        for name, info in matches.items()
        if info["type"] != "directory" and ("/." in root or not _is_hidden(name, _fixed_part(root)))
    ]
    if not found:
        what = f"{len(matches)} folders but no file" if matches else "nothing"
        raise SourceError(f"{path}: the glob matches {what}: check it (**/ matches folders at any depth)")
    return sorted(found, key=_by_uri)


def _folder(filesystem: Any, root: str, path: str, extensions: tuple[str, ...]) -> list[StoredFile]:
    """The files of one folder, searched in full, that have an extension."""
    suffixes = tuple(f".{extension.lstrip('.').lower()}" for extension in extensions)
    num_seen, found = 0, []
    for name, info in _walk(filesystem, root):
        num_seen += 1
        if name.lower().endswith(suffixes):
            uri = _uri(filesystem, name)
            found.append(_listed(uri, info) if info is not None else _local_file(uri))
    if not found:
        seen = f"{num_seen} files, none of them ending in {', '.join(suffixes)}" if num_seen else "an empty folder"
        raise SourceError(f"{path}: found {seen}: name another folder, or other extensions")
    return sorted(found, key=_by_uri)


def _walk(filesystem: Any, root: str) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Every visible file below `root`, with what a listing says of it; local files are asked one by one."""
    if not isinstance(filesystem, LocalFileSystem):
        for name, info in filesystem.find(root, detail=True).items():
            if not name.endswith("/") and not _is_hidden(name, root):
                yield name, info
        return
    # fsspec leaves out local folders that it cannot read; a missing part of a data set must not go unnoticed.
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((os.path.join(folder, name), None) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _fixed_part(glob: str) -> str:
    """The folder of a glob in front of its first wildcard."""
    return re.split(r"[*?\[]", glob, maxsplit=1)[0].rpartition("/")[0]


def _is_hidden(name: str, root: str) -> bool:
    return "/." in f"/{name.removeprefix(root).lstrip('/')}"


def _uri(filesystem: Any, name: str) -> str:
    return name if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(name))


def _by_uri(file: StoredFile) -> str:
    return file.uri


def _local_file(path: str) -> StoredFile:
    with read_errors(path):
        try:
            path.encode()
        except UnicodeEncodeError:
            shown = path.encode(errors="surrogateescape")
            raise SourceError(f"{shown!r}: the name is not UTF-8: rename the file") from None
        try:
            status = os.stat(path)
        except FileNotFoundError:  # a link to nothing, or a file removed since it was listed
            return StoredFile(uri=path, stamp=MISSING, size_bytes=None)
    return StoredFile(uri=path, stamp=f"{status.st_size}-{status.st_mtime_ns}", size_bytes=status.st_size)


def _listed(uri: str, info: Mapping[str, Any]) -> StoredFile:
    """The file that a listing describes by `info`."""
    local = local_path(uri)
    if local is not None:
        return _local_file(local)
    change = next((info[key] for key in CHANGE_KEYS if info.get(key)), None)
    if isinstance(change, datetime):
        change = change.timestamp()
    size = info.get("size")
    return StoredFile(uri=uri, stamp="" if change is None else f"{size}-{change}".replace('"', ""), size_bytes=size)


def folder_of(uri: str) -> str:
    """The folder or URL prefix that holds `uri`."""
    return posixpath.dirname(uri)


def user_cache_folder(name: str) -> str:
    """Where this user's derived files of one kind lie on this machine: they can be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "tokenmill", name)
