"""Token files: Parquet whose token columns can be memory-mapped (the "direct" profile, docs/formats.md).

A token column is a fixed-size binary, never null, PLAIN, uncompressed, without dictionary or statistics, one
data page per row group: its values are the last ``rows * width`` bytes of the column chunk, so a reader needs
only the footer to find any row. For every other reader the file is ordinary Parquet.
"""

import io
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib

from ..schemas.errors import REPAIR_REMEDY, CacheError
from ..schemas.tables import FORMAT_KEY, check_format, with_format

ROW_GROUP_BYTES = 4 << 20
MOST_ROWS = 16384  # in a row group: pyarrow begins another page after 20,000
PROFILE = b"tokenmill.profile"
LAYOUT = b"tokenmill.layout"
FINGERPRINT = b"tokenmill.fingerprint"
CHECKSUMS = b"tokenmill.crc32"
LOW, HIGH = "tokens", "tokens_high"
LEVEL = "level_"  # and its number from 1: the column of a level's codes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """How the tokens of one clip lie in a file: their number type and shape.

    `dtype` is ``uint16`` for codes, ``float32``, ``float16`` or ``bfloat16`` for latents, always little-endian.
    Codebooks of more than 65,536 codes keep the bits above 16 in a second column, `high_bits` to a code.
    `levels` are the (t,h,w) grids of codes that come in levels, each of which has a column, so that the first few can
    be read alone. They are (t,h,w,L) on one grid, and (n,), one level after the other, where each has its own.
    """

    dtype: str
    shape: tuple[int, ...]
    codebook_size: int | None
    levels: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of_levels(cls, grids: Sequence[tuple[int, ...]], codebook_size: int) -> "TokenLayout":
        """That of codes of as many levels as `grids`, of up to 65,536 codes each."""
        if not grids or codebook_size > 1 << 16:
            raise ValueError(f"one level or more, of up to 65,536 codes: {grids=} {codebook_size=}")
        is_one_grid = len(set(grids)) == 1
        shape = (*grids[0], len(grids)) if is_one_grid else (sum(int(np.prod(grid)) for grid in grids),)
        return cls(dtype="uint16", shape=shape, codebook_size=codebook_size, levels=tuple(grids))

    def first_levels(self, count: int) -> "TokenLayout":
        """That of the first levels alone; ValueError where there are not so many."""
        if not 1 <= count <= len(self.levels):
            raise ValueError(f"1 to {len(self.levels)} levels can be taken: {count=}")
        levels = self.levels[:count]
        is_one_grid = len(self.shape) == 4
        shape = (*levels[0], count) if is_one_grid else (sum(int(np.prod(grid)) for grid in levels),)
        return replace(self, shape=shape, levels=levels)

    @property
    def num_values(self) -> int:
        """Values in one clip."""
        return int(np.prod(self.shape))

    @property
    def num_tokens(self) -> int:
        """Tokens in one clip: every code is one, and the numbers of a latent are one together."""
        return self.num_values if self.codebook_size else int(np.prod(self.shape[:-1]))

    @property
    def high_bits(self) -> int:
        """Bits of a code above the sixteenth, rounded up to 0, 1, 2, 4, 8 or 16."""
        extra = (self.codebook_size - 1).bit_length() - 16 if self.codebook_size else 0
        return 0 if extra <= 0 else 1 << (extra - 1).bit_length()

    @property
    def widths(self) -> dict[str, int]:
        """Bytes per clip of every token column."""
        if self.levels:
            return {f"{LEVEL}{n}": 2 * int(np.prod(grid)) for n, grid in enumerate(self.levels, start=1)}
        low = self.num_values * (4 if self.dtype == "float32" else 2)
        return {LOW: low, HIGH: -(-self.num_values * self.high_bits // 8)} if self.high_bits else {LOW: low}

    @property
    def rows_per_group(self) -> int:
        """Clips in a row group of about ROW_GROUP_BYTES."""
        return min(MOST_ROWS, max(1, ROW_GROUP_BYTES // sum(self.widths.values())))

    def to_json(self) -> str:
        """The layout as the footer keeps it."""
        return json.dumps(
            {
                "dtype": self.dtype,
                "shape": self.shape,
                "codebook_size": self.codebook_size,
                "endianness": "little",
                **({"levels": self.levels} if self.levels else {}),
            }
        )

    @classmethod
    def from_json(cls, text: bytes) -> "TokenLayout":
        """The layout that a footer keeps."""
        values = json.loads(text)
        return cls(
            dtype=values["dtype"],
            shape=tuple(values["shape"]),
            codebook_size=values["codebook_size"],
            levels=tuple(tuple(grid) for grid in values.get("levels", ())),
        )


def to_planes(values_N: np.ndarray, layout: TokenLayout) -> dict[str, np.ndarray]:
    """The bytes (N, width) uint8 of every token column, from codes (N,...) or from the bits of latents (N,...)."""
    flat = values_N.reshape(len(values_N), layout.num_values)
    if layout.codebook_size is None:
        return {LOW: np.ascontiguousarray(flat).view(np.uint8)}
    if flat.size and (flat.min() < 0 or flat.max() >= layout.codebook_size):
        raise ValueError(f"codes reach from {flat.min()} to {flat.max()}, the codebook has {layout.codebook_size}")
    if layout.levels:
        by_level = levels_of(values_N, layout)
        stored = (np.ascontiguousarray(codes.reshape(len(codes), -1), dtype="<u2") for codes in by_level)
        return {name: codes.view(np.uint8) for name, codes in zip(layout.widths, stored, strict=True)}
    planes = {LOW: np.ascontiguousarray(flat & 0xFFFF, dtype="<u2").view(np.uint8)}
    if layout.high_bits:
        planes[HIGH] = _pack(flat >> 16, layout.high_bits)
    return planes


def from_planes(planes: Mapping[str, np.ndarray], layout: TokenLayout) -> np.ndarray:
    """Codes (N,...) int32, or the bits of latents (N,...) as float32, float16 or (for bfloat16) int16."""
    if layout.levels:
        by_level = [np.ascontiguousarray(planes[name]).view("<u2") for name in layout.widths]
        joined = np.concatenate(by_level, axis=1, dtype=np.int32)
        if len(layout.shape) == 1:
            return joined
        # Level after level in memory too: interleaving them would take longer than reading them.
        return np.moveaxis(joined.reshape(len(joined), len(layout.levels), *layout.levels[0]), 1, -1)
    kinds = {"uint16": "<u2", "float16": "<f2", "float32": "<f4", "bfloat16": "<i2"}
    values = np.ascontiguousarray(planes[LOW]).view(kinds[layout.dtype])
    if layout.codebook_size is not None:
        values = values.astype(np.int32)
    if layout.high_bits:
        values |= _unpack(planes[HIGH], layout.high_bits, layout.num_values) << 16
    return values.reshape(len(values), *layout.shape)


def levels_of(values_N: np.ndarray, layout: TokenLayout) -> list[np.ndarray]:
    """The codes (N,t,h,w) of each level, of codes (N,...) of all levels."""
    if len(layout.shape) == 4:
        return list(np.moveaxis(values_N, -1, 0))
    ends = np.cumsum([np.prod(grid) for grid in layout.levels])
    parts = np.split(values_N, ends[:-1], axis=1)
    return [part.reshape(-1, *grid) for part, grid in zip(parts, layout.levels, strict=True)]


def _pack(high: np.ndarray, bits: int) -> np.ndarray:
    """Small integers (N, n) below 2**bits to bytes (N, ceil(n*bits/8)), the first in the lowest bits."""
    if bits >= 8:
        return np.ascontiguousarray(high, dtype=f"<u{bits // 8}").view(np.uint8)
    per_byte = 8 // bits
    padded = np.zeros((high.shape[0], -(-high.shape[1] // per_byte) * per_byte), np.uint8)
    padded[:, : high.shape[1]] = high
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    shifted = padded.reshape(len(high), -1, per_byte) << shifts
    return np.bitwise_or.reduce(shifted, axis=2)


def _unpack(packed: np.ndarray, bits: int, num_values: int) -> np.ndarray:
    if bits >= 8:
        return np.ascontiguousarray(packed).view(f"<u{bits // 8}").astype(np.int32)
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    values = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(len(packed), -1)[:, :num_values].astype(np.int32)


def write_token_file(
    path: str, rows: pa.Table, values_N: np.ndarray, layout: TokenLayout, footer: Mapping[str, str]
) -> None:
    """Write `rows` (clip_id and other small columns) with their tokens to a new local file, then check it.

    `values_N` holds codes (N,...) or the bits of latents, in the order of `rows`.
    """
    planes = to_planes(values_N, layout)
    token_fields = [pa.field(name, pa.binary(width), nullable=False) for name, width in layout.widths.items()]
    schema = with_format(pa.schema([*rows.schema, *token_fields]), **footer)
    columns = [_fixed_binary(planes[name], width) for name, width in layout.widths.items()]
    table = pa.Table.from_arrays([*rows.columns, *columns], schema=schema)
    group = layout.rows_per_group
    checksums = {
        name: [isal_zlib.crc32(plane[i : i + group].data) for i in range(0, len(plane), group)]
        for name, plane in planes.items()
    }
    small = [field.name for field in rows.schema]
    with pq.ParquetWriter(
        path,
        schema,
        compression={name: "zstd" for name in small} | {name: "none" for name in planes},  # pyright: ignore[reportArgumentType]
        use_dictionary=False,
        write_statistics=small,  # pyright: ignore[reportArgumentType]
        column_encoding={name: "PLAIN" for name in planes},
        data_page_size=1 << 30,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=group)
        writer.add_key_value_metadata(
            {PROFILE: "direct", LAYOUT: layout.to_json(), CHECKSUMS: json.dumps(checksums)}  # pyright: ignore
        )
    _check_written(path, planes)


def _fixed_binary(plane: np.ndarray, width: int) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(width), len(plane), [None, pa.py_buffer(plane)])


def _check_written(path: str, planes: Mapping[str, np.ndarray]) -> None:
    """Read the file back: the layout must be direct, and every byte what was meant."""
    with open(path, "rb") as stream:
        file = TokenFile(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), path)
    if not file.is_direct:
        raise CacheError(f"{path}: the Parquet library wrote a layout that cannot be memory-mapped")
    rows = np.arange(file.num_rows)
    for name, plane in file.read_planes(rows).items():
        if not np.array_equal(plane, planes[name]):
            raise CacheError(f"{path}: column {name} was not stored as written; check the disk")


class TokenFile:
    """One token file, read through a buffer (a memory map, or bytes): any rows, checked on first touch.

    Through an open stream only its footer is read: it says where tokens lie, and does not give them.
    """

    def __init__(self, buffer: Any, name: str) -> None:
        self._name = name
        self._buffer = buffer
        self._parquet = open_parquet(buffer, name)
        footer = check_token_file(self._parquet, name)
        self.layout = TokenLayout.from_json(footer[LAYOUT])
        self.fingerprint = footer.get(FINGERPRINT, b"").decode()
        self._checksums: dict[str, list[int]] = json.loads(footer.get(CHECKSUMS, b"{}"))
        self._widths = self.layout.widths
        self._groups = self._row_groups()
        self._group_sizes = [self._parquet.metadata.row_group(i).num_rows for i in range(len(self._groups))]
        self._group_ends = np.cumsum(self._group_sizes)
        self.num_rows: int = self._parquet.metadata.num_rows
        self.is_direct = all(offset is not None for group in self._groups for offset in group.values())
        if not self.is_direct:  # rewritten by others: the digests are of other row groups
            self._checksums = {}
        self._checked: set[tuple[int, str]] = set()

    def read(self, rows: Sequence[int] | np.ndarray, *, verify: bool = True) -> np.ndarray:
        """Codes (N,...) int32 or the bits of latents (N,...) of the rows asked, in their order."""
        return from_planes(self.read_planes(np.asarray(rows, np.int64), verify=verify), self.layout)

    def read_planes(
        self, rows_N: np.ndarray, layout: TokenLayout | None = None, *, verify: bool = True
    ) -> dict[str, np.ndarray]:
        """The bytes (N, width) of every token column, copied out of the buffer in the order asked.

        `layout` may be that of the first levels alone: no other column is touched. With `verify`, CacheError where a
        column of a row group that is touched for the first time is damaged.
        """
        widths = (layout or self.layout).widths
        if rows_N.size and (rows_N.min() < 0 or rows_N.max() >= self.num_rows):
            raise IndexError(f"{self._name} has {self.num_rows} rows, asked for {rows_N.min()} to {rows_N.max()}")
        planes = {name: np.empty((len(rows_N), width), np.uint8) for name, width in widths.items()}
        groups_N = np.searchsorted(self._group_ends, rows_N, side="right")
        for group in np.unique(groups_N).tolist():
            chosen = np.flatnonzero(groups_N == group)
            rows = rows_N[chosen] - (self._group_ends[group - 1] if group else 0)
            for name in widths:
                planes[name][chosen] = self._group_plane(group, name, verify=verify)[rows]
        return planes

    def place(self, row: int, column: str) -> tuple[int, int]:
        """Where the bytes of a row's `column` begin in the file, and how many they are; CacheError as `group_place`."""
        offset, _, _ = self.group_place(row, column)
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        width = self._widths[column]
        return offset + (row - (int(self._group_ends[group - 1]) if group else 0)) * width, width

    def group_place(self, row: int, column: str) -> tuple[int, int, int | None]:
        """Where the `column` of all rows of a row's group begins, how many bytes it has, and their CRC-32 if known.

        CacheError where its bytes cannot be addressed, since another tool has rewritten the file.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self._name} has {self.num_rows} rows, asked for {row}")
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        offset = self._groups[group][column]
        if offset is None:
            raise not_direct(self._name)
        checksum = self._checksums[column][group] if self._checksums else None
        return offset, self._group_sizes[group] * self._widths[column], checksum

    def _group_plane(self, group: int, name: str, *, verify: bool) -> np.ndarray:
        """A view (rows, width) of one token column of a row group; checked against its digest the first time."""
        num_rows, width = self._group_sizes[group], self._widths[name]
        offset = self._groups[group][name]
        if offset is None:
            column = self._parquet.read_row_group(group, columns=[name], use_threads=False).column(0)
            plane = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
        else:
            plane = np.frombuffer(self._buffer, np.uint8, num_rows * width, offset)
        if verify and (group, name) not in self._checked:
            self._check(group, name, plane)
        return plane.reshape(num_rows, width)

    def _check(self, group: int, name: str, plane: np.ndarray) -> None:
        if self._checksums and isal_zlib.crc32(plane.data) != self._checksums[name][group]:
            raise CacheError(
                f"{self._name}: row group {group} of column {name} is damaged (its CRC-32 does not match):"
                f" {REPAIR_REMEDY}"
            )
        self._checked.add((group, name))

    def _row_groups(self) -> list[dict[str, int | None]]:
        """For every row group, where each token column's values begin; None where they cannot be mapped."""
        metadata = self._parquet.metadata
        names = self._parquet.schema_arrow.names
        groups = []
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            columns = {name: group.column(names.index(name)) for name in self.layout.widths}
            groups.append({name: values_offset(column, self.layout.widths[name]) for name, column in columns.items()})
        return groups


def open_parquet(buffer: Any, name: str) -> pq.ParquetFile:
    """The Parquet file `name`, whose bytes `buffer` holds or, as an open stream, gives; CacheError where it is none.

    Pages are checked when read.
    """
    source = buffer if isinstance(buffer, io.IOBase) else pa.BufferReader(pa.py_buffer(buffer))
    try:
        return pq.ParquetFile(source, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise CacheError(
            f"{name}: not a readable Parquet file ({error}): tokenmill verify names what is damaged"
        ) from None


def check_token_file(parquet: pq.ParquetFile, name: str) -> dict[bytes, bytes]:
    """The footer of a token file; CacheError where the file is none, or of another format."""
    footer = {**(parquet.schema_arrow.metadata or {}), **(parquet.metadata.metadata or {})}
    if LAYOUT not in footer:
        raise CacheError(f"{name}: no token layout in its footer, so it is not a token file")
    check_format(int(footer.get(FORMAT_KEY, b"0")), name)
    return footer


def not_direct(name: str) -> CacheError:
    """What is said of a file that is read as a whole alone."""
    return CacheError(
        f"{name}: another tool has rewritten it, so parts of its clips cannot be found in it: read whole clips"
        f" (TokenCache.read), or delete the file's manifest and have tokenmill run make it anew"
    )


def values_offset(column: Any, width: int) -> int | None:
    """Where the values of a direct column chunk begin: after one small page header (and the levels of lists).

    None for other layouts.
    """
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page or "PLAIN" not in column.encodings:
        return None
    start = column.data_page_offset + column.total_compressed_size - column.num_values * width
    return start if 0 < start - column.data_page_offset < 4096 + column.num_values else None
