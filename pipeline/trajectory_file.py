"""Files of trajectory tokens: the direct profile (docs/formats.md) for clips of different numbers of tokens.

The column ``tokens`` is a list, never null, of fixed-size binaries, never null: PLAIN, uncompressed, one data page per
row group. Its values are the last ``tokens * width`` bytes of the column chunk, and ``num_tokens`` says whose they are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib

from ..schemas.errors import REPAIR_REMEDY, CacheError
from ..schemas.tables import TRAJECTORY_TOKENS_SCHEMA, with_format
from ..schemas.tokens import TrajectoryTokens
from .label_codec import pack_planes, unpack_planes
from .token_file import (
    CHECKSUMS,
    LAYOUT,
    LOW,
    MOST_ROWS,
    PROFILE,
    ROW_GROUP_BYTES,
    TokenLayout,
    check_token_file,
    not_direct,
    open_parquet,
    values_offset,
)


def write_trajectory_file(
    path: str,
    clip_ids: Sequence[str],
    clips: Sequence[TrajectoryTokens],
    layout: TokenLayout,
    footer: Mapping[str, str],
) -> None:
    """Write the tokens of clips to a new local file, then check it.

    `layout` says the number type of a token and its one dimension; bfloat16 values come as the int16 of their bits.
    """
    width = layout.widths[LOW]
    ends_N = np.cumsum([len(clip.values_Nd) for clip in clips])
    values = np.ascontiguousarray(np.concatenate([clip.values_Nd for clip in clips])).view(np.uint8)
    values = values.reshape(-1, width)
    field = pa.field(LOW, pa.list_(pa.field("element", pa.binary(width), nullable=False)), nullable=False)
    schema = with_format(pa.schema([*TRAJECTORY_TOKENS_SCHEMA, field]), **footer)
    small = pa.Table.from_pylist(
        [_small_row(clip_id, clip) for clip_id, clip in zip(clip_ids, clips, strict=True)],
        schema=TRAJECTORY_TOKENS_SCHEMA,
    )
    lists = pa.ListArray.from_arrays(
        pa.array(np.append(0, ends_N), pa.int32()),
        pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)]),
        type=field.type,
    )
    table = pa.Table.from_arrays([*small.columns, lists], schema=schema)
    checksums, start = [], 0
    with pq.ParquetWriter(
        path,
        schema,
        compression={name: "zstd" for name in small.column_names} | {LOW: "none"},  # pyright: ignore[reportArgumentType]
        use_dictionary=False,
        write_statistics=["clip_id", "num_valid", "num_tokens"],  # pyright: ignore[reportArgumentType]
        data_page_size=1 << 30,
        write_page_checksum=True,
    ) as writer:
        for stop in _group_ends(ends_N, width):
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
            first = ends_N[start - 1] if start else 0
            checksums.append(isal_zlib.crc32(values[first : ends_N[stop - 1]].data))
            start = stop
        writer.add_key_value_metadata(
            {PROFILE: "direct", LAYOUT: layout.to_json(), CHECKSUMS: json.dumps({LOW: checksums})}  # pyright: ignore
        )
    _check_written(path, clips)


def _small_row(clip_id: str, clip: TrajectoryTokens) -> dict[str, Any]:
    return {
        "clip_id": clip_id,
        "num_valid": clip.num_valid,
        "num_tokens": len(clip.values_Nd),
        "chunk_frames": clip.chunk_frames,
        "slots": clip.slots_N,
        "chunks": clip.chunks_N,
        "trajectories": clip.trajectories_N,
        "mass": clip.mass_N,
        "assignment": pack_planes(clip.assignment_Thw),
        "assignment_shape": clip.assignment_Thw.shape,
    }


def _group_ends(ends_N: np.ndarray, width: int) -> list[int]:
    """Where row groups of about ROW_GROUP_BYTES end, in rows."""
    stops, begun = [], 0
    for row, end in enumerate(ends_N.tolist(), start=1):
        is_full = (end - begun) * width >= ROW_GROUP_BYTES or row - (stops[-1] if stops else 0) == MOST_ROWS
        if is_full or row == len(ends_N):
            stops.append(row)
            begun = end
    return stops


def _check_written(path: str, clips: Sequence[TrajectoryTokens]) -> None:
    with open(path, "rb") as stream:
        file = TrajectoryFile(stream.read(), path)
    if not file.is_direct:
        raise CacheError(f"{path}: the Parquet library wrote a layout that cannot be memory-mapped")
    for row, clip in enumerate(clips):
        found = file.read(row)
        same = found.values_Nd.tobytes() == np.ascontiguousarray(clip.values_Nd).tobytes()
        if not same or not np.array_equal(found.assignment_Thw, clip.assignment_Thw):
            raise CacheError(f"{path}: row {row} was not stored as written; check the disk")


class TrajectoryFile:
    """One file of trajectory tokens, read through a buffer (a memory map, or bytes), checked on first touch.

    Through an open stream it says where tokens lie and gives their outlines, but not themselves.
    """

    def __init__(self, buffer: Any, name: str) -> None:
        self._name, self._buffer = name, buffer
        self._parquet = open_parquet(buffer, name)
        footer = check_token_file(self._parquet, name)
        self.layout = TokenLayout.from_json(footer[LAYOUT])
        self._checksums: list[int] = json.loads(footer.get(CHECKSUMS, b"{}")).get(LOW, [])
        metadata = self._parquet.metadata
        columns = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
        index = next(i for i, path in enumerate(columns) if path.startswith(f"{LOW}."))
        width = self.layout.widths[LOW]
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._offsets = [values_offset(group.column(index), width) for group in groups]
        self._group_ends = np.cumsum([group.num_rows for group in groups])
        self.num_rows: int = metadata.num_rows
        self.is_direct = all(offset is not None for offset in self._offsets)
        if not self.is_direct:  # rewritten by others: the digests are of other row groups
            self._checksums = []
        self._rows: dict[int, tuple[list[dict[str, Any]], np.ndarray]] = {}
        self._values: dict[int, np.ndarray] = {}

    def read(self, row: int, *, verify: bool = True) -> TrajectoryTokens:
        """The tokens of one clip; bfloat16 as the int16 of its bits. CacheError where its row group is damaged."""
        group, small, end = self._row(row)
        if group not in self._values:
            self._values[group] = self._open(group, verify=verify)
        kinds = {"float16": "<f2", "float32": "<f4", "bfloat16": "<i2"}
        chosen = self._values[group][end - small["num_tokens"] : end]
        return self._tokens(row, small, chosen.copy().view(kinds[self.layout.dtype]))

    def outline(self, row: int) -> TrajectoryTokens:
        """All about the tokens of one clip but themselves, which are not read: `values_Nd` is (N,0)."""
        _, small, _ = self._row(row)
        return self._tokens(row, small, np.empty((small["num_tokens"], 0)))

    def place(self, row: int) -> tuple[int, int]:
        """Where the bytes of a clip's first token begin in the file, and how many each token has.

        CacheError where they cannot be addressed, since another tool has rewritten the file.
        """
        group, small, end = self._row(row)
        offset, width = self._offsets[group], self.layout.widths[LOW]
        if offset is None:
            raise not_direct(self._name)
        return offset + (end - small["num_tokens"]) * width, width

    def group_place(self, row: int) -> tuple[int, int, int | None]:
        """Where the tokens of a clip's row group begin, how many bytes they have, and their CRC-32 if it is known."""
        group, _, _ = self._row(row)
        _, ends_N = self._rows[group]
        offset = self._offsets[group]
        if offset is None:
            raise not_direct(self._name)
        checksum = self._checksums[group] if self._checksums else None
        return offset, int(ends_N[-1]) * self.layout.widths[LOW], checksum

    def _row(self, row: int) -> tuple[int, dict[str, Any], int]:
        """The row group of a clip, its small columns, and the end of its tokens among those of the group."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self._name} has {self.num_rows} rows, asked for {row}")
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        if group not in self._rows:
            rows = self._small_rows(group)
            self._rows[group] = rows, np.cumsum([one["num_tokens"] for one in rows])
        rows, ends_N = self._rows[group]
        local = row - (int(self._group_ends[group - 1]) if group else 0)
        return group, rows[local], int(ends_N[local])

    def _tokens(self, row: int, small: Mapping[str, Any], values_Nd: np.ndarray) -> TrajectoryTokens:
        try:
            assignment_Thw = unpack_planes(small["assignment"], tuple(small["assignment_shape"]))
        except ValueError as error:
            raise CacheError(f"{self._name}: row {row}: {error}: {REPAIR_REMEDY}") from None
        return TrajectoryTokens(
            values_Nd=values_Nd,
            slots_N=np.array(small["slots"], np.int64),
            chunks_N=np.array(small["chunks"], np.int64),
            trajectories_N=np.array(small["trajectories"], np.int64),
            assignment_Thw=assignment_Thw,
            chunk_frames=small["chunk_frames"],
            num_valid=small["num_valid"],
            mass_N=None if small["mass"] is None else np.array(small["mass"], np.float32),
        )

    def _small_rows(self, group: int) -> list[dict[str, Any]]:
        try:
            columns = TRAJECTORY_TOKENS_SCHEMA.names
            return self._parquet.read_row_group(group, columns=columns, use_threads=False).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise CacheError(f"{self._name}: row group {group} is damaged ({error}): {REPAIR_REMEDY}") from None

    def _open(self, group: int, *, verify: bool) -> np.ndarray:
        """All tokens (n, width) of a row group."""
        offset, width = self._offsets[group], self.layout.widths[LOW]
        if offset is None:
            column = self._parquet.read_row_group(group, columns=[LOW], use_threads=False).column(0)
            data = b"".join(value for row in column.to_pylist() for value in row)
            values = np.frombuffer(data, np.uint8).reshape(-1, width)
        else:
            _, ends_N = self._rows[group]
            values = np.frombuffer(self._buffer, np.uint8, int(ends_N[-1]) * width, offset).reshape(-1, width)
        if verify and self._checksums and isal_zlib.crc32(values.data) != self._checksums[group]:
            raise CacheError(
                f"{self._name}: row group {group} of column {LOW} is damaged (its CRC-32 does not match):"
                f" {REPAIR_REMEDY}"
            )
        return values
