"""Where the tokens of a file lie: the row groups of its token columns, and a digest of everything else in it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import CacheError
from ..schemas.tables import FORMAT_KEY, check_format
from .frame_file import EMBEDDINGS_COLUMN, ENCODER
from .sql_bytes import bytes_of
from .token_file import CHECKSUMS, LAYOUT, TokenLayout, open_parquet, values_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """One token column of one row group: `num_values` values of the same width for `num_rows` clips.

    They begin at `offset` of the file, `size_bytes` together; `offset` and `crc32` are None where another tool has
    rewritten the file in a layout that cannot be memory-mapped.
    """

    row_group: int
    column: str
    num_rows: int
    num_values: int
    offset: int | None
    size_bytes: int
    crc32: int | None


def read_row_groups(buffer: Any, name: str) -> list[RowGroup]:
    """The token columns of a file of tokens, embeddings or embedded frames, from its footer alone.

    `buffer` holds the file `name` or is an open stream of it. CacheError where it is no such file, or damaged.
    """
    parquet = open_parquet(buffer, name)
    footer = {**(parquet.schema_arrow.metadata or {}), **(parquet.metadata.metadata or {})}
    check_format(int(footer.get(FORMAT_KEY, b"0")), name)
    checksums: dict[str, list[int]] = json.loads(footer.get(CHECKSUMS, b"{}"))
    groups = [
        _row_group(parquet.metadata.row_group(i), i, column, width)
        for column, width in _widths(footer, name).items()
        for i in range(parquet.metadata.num_row_groups)
    ]
    if any(group["offset"] is None for group in groups):  # rewritten: the checksums are of other row groups
        return [RowGroup(**{**group, "offset": None}, crc32=None) for group in groups]
    return [
        RowGroup(**group, crc32=checksums[group["column"]][group["row_group"]] if checksums else None)
        for group in groups
    ]


def _widths(footer: Mapping[bytes, bytes], name: str) -> dict[str, int]:
    """Bytes of one value of every token column."""
    if LAYOUT in footer:
        return TokenLayout.from_json(footer[LAYOUT]).widths
    if ENCODER.encode() in footer:
        return {EMBEDDINGS_COLUMN: 2 * json.loads(footer[ENCODER.encode()])["dim"]}
    raise CacheError(f"{name}: neither a token layout nor an encoder in its footer, so it has no tokens")


def _row_group(metadata: pq.RowGroupMetaData, number: int, column: str, width: int) -> dict[str, Any]:
    chunks = (metadata.column(i) for i in range(metadata.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column)
    return {
        "row_group": number,
        "column": column,
        "num_rows": metadata.num_rows,
        "num_values": chunk.num_values,
        "offset": values_offset(chunk, width),
        "size_bytes": chunk.num_values * width,
    }


def ranges_between(spans: Iterable[tuple[int, int]], size_bytes: int) -> list[tuple[int, int]]:
    """Begin and end of what a file of `size_bytes` holds besides the tokens that lie at `spans` (offset and size)."""
    ranges, begin = [], 0
    for offset, size in sorted(spans):
        ranges.append((begin, offset))
        begin = offset + size
    return [(first, last) for first, last in [*ranges, (begin, size_bytes)] if last > first]


def rest_digest(path: str) -> str:
    """The SHA-256 of all that a local token file holds besides tokens: headers, small columns and footer."""
    with open(path, "rb") as stream:
        spans = [
            (group.offset, group.size_bytes) for group in read_row_groups(stream, path) if group.offset is not None
        ]
        digest = hashlib.sha256()
        for begin, end in ranges_between(spans, os.fstat(stream.fileno()).st_size):
            stream.seek(begin)
            digest.update(stream.read(end - begin))
    return digest.hexdigest()


def read_values(buffer: Any, name: str, *, row_group: int, column: str) -> bytes:
    """All values of a token column of a row group, one after the other, of a file in whatever layout."""
    values = open_parquet(buffer, name).read_row_group(row_group, columns=[column], use_threads=False).column(0)
    array = values.combine_chunks()
    return bytes_of(array.flatten() if pa.types.is_list(array.type) else array).tobytes()
