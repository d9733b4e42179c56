"""Fetching: any video of a source as a file on the local disk."""

import contextlib
import errno
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import pyarrow.parquet as pq

from ..schemas.errors import SourceError
from .places import ParquetCell, TarMember, local_path, open_store, read_errors, stored_file, video_inside
from .retries import RetryPolicy, with_retries
from .storage import storage_errors

CHUNK_BYTES = 8 << 20
HELD_ROW_GROUP_BYTES = 256 << 20
WEB = RetryPolicy(attempts=3)  # dead links are common, and S3 sees to itself
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}$")


@contextlib.contextmanager
def local_file(uri: str, scratch: str | None = None) -> Iterator[str]:
    """The path of a local file with the bytes of the video at `uri`.

    A plain local file is given as it is. Anything else (an object, a tar member, a Parquet cell) is copied to
    a file in `scratch` (the system's temporary folder by default) that is removed on exit. SourceError: the
    video cannot be read. StorageError: the scratch folder cannot be written.
    """
    inside, local = video_inside(uri), local_path(uri)
    if inside is None and local is not None:
        if os.path.exists(local) and not (
            os.path.isfile(local) or os.path.isdir(local)
        ):  # opening a pipe would wait for ever
            raise SourceError(f"{uri}: not a regular file: name a video file")
        with read_errors(uri), open(local, "rb"):
            pass
        yield local
        return
    folder = scratch or tempfile.gettempdir()
    with contextlib.ExitStack() as stack:
        with storage_errors(folder):
            copy = stack.enter_context(
                tempfile.NamedTemporaryFile(dir=folder, prefix="tokenmill-", suffix=_suffix(uri, inside))
            )
        if inside is None:
            _download(uri, copy.name, folder)
        else:
            chunks = _member_chunks(inside, uri) if isinstance(inside, TarMember) else [_cell(inside, uri)]
            for chunk in chunks:
                with storage_errors(folder):
                    copy.write(chunk)
            with storage_errors(folder):
                copy.flush()
        yield copy.name


@contextlib.contextmanager
def open_for_reading(uri: str, **options: Any) -> Iterator[IO[bytes]]:
    """The whole file at `uri`, open and seekable; `options` go to fsspec for files that are not local."""
    filesystem, path = open_store(uri)
    with read_errors(uri):
        stream = open(path, "rb") if local_path(uri) is not None else filesystem.open(path, "rb", **options)
    with contextlib.closing(stream):
        yield stream


def _suffix(uri: str, inside: TarMember | ParquetCell | None) -> str:
    """The file extension that demuxers may look at."""
    if isinstance(inside, ParquetCell):
        return ""
    name = inside.name if inside else uri.partition("?")[0]
    match = SUFFIX.search(name)
    return match[0] if match else ""


def _download(uri: str, path: str, folder: str) -> None:
    """Copy a whole file of a store to `path` in `folder`, as a stream: not every server can give ranges."""
    filesystem, remote_path = open_store(uri)
    with read_errors(uri):
        try:
            if uri.startswith(("http://", "https://")):
                with_retries(lambda: filesystem.get_file(remote_path, path), uri, WEB)
            else:
                filesystem.get_file(remote_path, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with storage_errors(folder):
                    raise
            raise


def _member_chunks(member: TarMember, uri: str) -> Iterator[bytes]:
    """The bytes of a tar member, and no others."""
    remaining = member.size_bytes
    with open_for_reading(member.file_uri, cache_type="none") as stream:
        while remaining:
            with read_errors(uri):
                stream.seek(member.offset + member.size_bytes - remaining)
                chunk = stream.read(min(CHUNK_BYTES, remaining))
            if not chunk:
                raise SourceError(f"{uri}: the tar ends {remaining} bytes too early: it is truncated, or has changed")
            remaining -= len(chunk)
            yield chunk


class _ColumnReader:
    """One binary column of one Parquet file, and the row group that was read last."""

    def __init__(self, cell: ParquetCell, stamp: str) -> None:
        self.key = (cell.file_uri, cell.column, stamp)
        filesystem, path = open_store(cell.file_uri)
        source = path if local_path(cell.file_uri) is not None else filesystem.open(path, "rb", cache_type="none")
        self.file = pq.ParquetFile(source)
        self.group, self.held = -1, None
        if cell.column not in self.file.schema_arrow.names:
            found = ", ".join(self.file.schema_arrow.names)
            raise SourceError(f"{cell.file_uri}: no column {cell.column!r}; found {found}")

    def read(self, row: int) -> bytes | None:
        """The bytes in `row`; IndexError where the file has fewer rows."""
        column = self.key[1]
        for group in range(self.file.metadata.num_row_groups):
            metadata = self.file.metadata.row_group(group)
            if row >= metadata.num_rows:
                row -= metadata.num_rows
                continue
            if self.group == group and self.held is not None:
                return self.held[row].as_py()
            if metadata.total_byte_size > HELD_ROW_GROUP_BYTES:
                # Too large to hold: read through it, forgetting what came before.
                batches = self.file.iter_batches(batch_size=1, row_groups=[group], columns=[column])
                return next(islice(batches, row, None)).column(0)[0].as_py()
            self.group, self.held = -1, None  # let go of the old group before the new one is read
            self.held = self.file.read_row_group(group, columns=[column]).column(0)
            self.group = group
            return self.held[row].as_py()
        raise IndexError(row)


class _LastReader(threading.local):
    """The column that a thread read last, kept open: neighbours share a row group."""

    reader: _ColumnReader | None = None


_last = _LastReader()


def _cell(cell: ParquetCell, uri: str) -> bytes:
    """The bytes of a video in a Parquet column."""
    stamp = stored_file(cell.file_uri).stamp
    with read_errors(uri):
        # An empty stamp cannot tell a rewritten file from the old one.
        if _last.reader is None or not stamp or _last.reader.key != (cell.file_uri, cell.column, stamp):
            _last.reader = None
            _last.reader = _ColumnReader(cell, stamp)
        try:
            data = _last.reader.read(cell.row)
        except IndexError:
            num_rows = _last.reader.file.metadata.num_rows
            raise SourceError(f"{uri}: the file has {num_rows} rows: it has changed since it was listed") from None
    if not data:
        raise SourceError(f"{uri}: the cell is empty: remove the row, or put a video into it")
    return data
