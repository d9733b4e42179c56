"""Parts of a cache's files: their footers, and the byte ranges that are asked for, without the rest."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from ..schemas.errors import REPAIR_REMEDY, CacheError
from .storage import Folder, storage_errors

MERGED_BYTES = 64 << 20  # that are read at once, at most

RANGE_TYPE = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

File = TypeVar("File")


class ByteRange(NamedTuple):
    """`size` bytes of the file `name` of a cache, from `offset` on."""

    name: str
    offset: int
    size: int


@contextlib.contextmanager
def opened(folder: Folder, name: str, kind: Callable[[Any, str], File]) -> Iterator[File]:
    """A token file of a `kind` (TokenFile, TrajectoryFile) that reads its footer now and small columns when asked.

    No tokens are read: in an object store, what is read is asked for in ranges.
    """
    with storage_errors(folder.uri(name)):
        path = folder.path(name)
        # Without a cache: one that reads ahead would fetch tokens along with what lies before them.
        stream = open(path, "rb") if folder.is_local else folder.fs.open(path, "rb", cache_type="none")
        with stream:
            yield kind(stream, folder.uri(name))


def read_ranges(folder: Folder, ranges: Sequence[ByteRange]) -> tuple[list[bytes], int]:
    """The bytes of each range, in the order asked, and how many bytes were read for them.

    Ranges that touch are read as one; what two ranges share is read twice, so that the sum of their sizes is what is
    read. Local files are read in place, others by range requests. CacheError where a file is shorter than a range
    says.
    """
    merged, members = _merged(ranges)
    read = _read_local(folder, merged) if folder.is_local else _read_remote(folder, merged)
    parts = [b""] * len(ranges)
    for whole, data, indices in zip(merged, read, members, strict=True):
        if len(data) != whole.size:
            raise CacheError(
                f"{folder.uri(whole.name)}: {whole.size} bytes were asked for at {whole.offset}, found {len(data)}:"
                f" {REPAIR_REMEDY}"
            )
        for i in indices:
            begin = ranges[i].offset - whole.offset
            parts[i] = data[begin : begin + ranges[i].size]
    return parts, sum(len(data) for data in read)


def _merged(ranges: Sequence[ByteRange]) -> tuple[list[ByteRange], list[list[int]]]:
    """What is read at once, and which of the ranges lie in each of them."""
    merged: list[ByteRange] = []
    members: list[list[int]] = []
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        one = ranges[i]
        last = merged[-1] if merged else None
        touches = last and last.name == one.name and last.offset + last.size == one.offset
        if last and touches and last.size + one.size <= MERGED_BYTES:
            merged[-1] = last._replace(size=last.size + one.size)
            members[-1].append(i)
        else:
            merged.append(one)
            members.append([i])
    return merged, members


def _read_local(folder: Folder, ranges: Sequence[ByteRange]) -> list[bytes]:
    """Each file is opened once: ranges of one file follow each other."""
    read: list[bytes] = []
    with contextlib.ExitStack() as stack:
        name, descriptor = "", -1
        for one in ranges:
            with storage_errors(folder.uri(one.name)):
                if one.name != name:
                    stack.close()
                    name, descriptor = one.name, os.open(folder.path(one.name), os.O_RDONLY)
                    stack.callback(os.close, descriptor)
                read.append(os.pread(descriptor, one.size, one.offset))
    return read


def _read_remote(folder: Folder, ranges: Sequence[ByteRange]) -> list[bytes]:
    if not ranges:
        return []
    paths = [folder.path(one.name) for one in ranges]
    starts, ends = [one.offset for one in ranges], [one.offset + one.size for one in ranges]
    with storage_errors(folder.url):
        return folder.fs.cat_ranges(paths, starts, ends, on_error="raise")
