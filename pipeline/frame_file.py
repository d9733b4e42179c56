"""Files of candidate frames: one row per clip, and embeddings so that they can be scanned at the speed of the disk."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib

from ..schemas.errors import CacheError
from ..schemas.tables import EMBEDDED_FRAMES_SCHEMA, FRAME_SCHEMA, with_format
from .frames import EmbeddedFrames
from .token_file import CHECKSUMS, MOST_ROWS

EMBEDDINGS_COLUMN = "embeddings"
ENCODER = "tokenmill.encoder"
ROW_GROUP_BYTES = 4 << 20


def write_frames(path: str, rows: Sequence[Mapping[str, Any]], footer: Mapping[str, str]) -> None:
    """Write the candidate frames of clips (FRAME_SCHEMA) to a new local file."""
    table = pa.Table.from_pylist(list(rows), schema=with_format(FRAME_SCHEMA, **footer))
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def embedded_schema(dim: int) -> pa.Schema:
    """The columns of a file of embeddings of `dim` numbers, each as the bytes of its little-endian float16."""
    element = pa.field("element", pa.binary(2 * dim), nullable=False)
    return pa.schema([*EMBEDDED_FRAMES_SCHEMA, pa.field(EMBEDDINGS_COLUMN, pa.list_(element), nullable=False)])


def write_embedded_frames(
    path: str,
    clips: Sequence[Mapping[str, Any]],
    embedded: Sequence[EmbeddedFrames],
    spec: Mapping[str, Any],
    footer: Mapping[str, str],
) -> None:
    """Write the embeddings of clips by the encoder of `spec` to a new local file, then check it."""
    dim = spec["dim"]
    small = pa.Table.from_pylist(
        [
            {**{name: clip[name] for name in ("clip_id", "video_id")}, "frames": one.frames, "pts_s": one.pts_s}
            for clip, one in zip(clips, embedded, strict=True)
        ],
        schema=EMBEDDED_FRAMES_SCHEMA,
    )
    values_KD = np.ascontiguousarray(np.concatenate([one.embeddings_KD for one in embedded]))
    ends_N = np.append(0, np.cumsum([len(one.frames) for one in embedded]))
    group = min(MOST_ROWS, max(1, ROW_GROUP_BYTES * len(embedded) // max(1, values_KD.nbytes)))
    bounds = [*ends_N[:-1:group], ends_N[-1]]
    checksums = [isal_zlib.crc32(values_KD[first:last].data) for first, last in itertools.pairwise(bounds)]
    footer = {**footer, ENCODER: json.dumps(spec, sort_keys=True)}
    schema = with_format(
        embedded_schema(dim), **footer, **{CHECKSUMS.decode(): json.dumps({EMBEDDINGS_COLUMN: checksums})}
    )
    lists = pa.ListArray.from_arrays(
        pa.array(ends_N, pa.int32()),
        pa.Array.from_buffers(pa.binary(2 * dim), len(values_KD), [None, pa.py_buffer(values_KD)]),
        type=schema.field(EMBEDDINGS_COLUMN).type,
    )
    table = pa.Table.from_arrays([*small.columns, lists], schema=schema)
    pq.write_table(
        table,
        path,
        row_group_size=group,
        compression={name: "zstd" for name in small.column_names} | {EMBEDDINGS_COLUMN: "none"},  # pyright: ignore[reportArgumentType]
        use_dictionary=False,
        write_statistics=["clip_id", "video_id"],  # pyright: ignore[reportArgumentType]
        data_page_size=1 << 30,
        write_page_checksum=True,
    )
    found_KD = np.concatenate([values_KD for _, values_KD in read_embedded_rows(pq.read_table(path), dim)])
    if found_KD.tobytes() != values_KD.tobytes():
        raise CacheError(f"{path}: embeddings were not stored as written; check the disk")


def read_embedded_rows(table: pa.Table, dim: int) -> list[tuple[str, np.ndarray]]:
    """The id and embeddings (K,D) float16 of each clip in a table of `embedded_schema`."""
    return [
        (clip_id, np.frombuffer(b"".join(values), "<f2").reshape(-1, dim))
        for clip_id, values in zip(table["clip_id"].to_pylist(), table[EMBEDDINGS_COLUMN].to_pylist(), strict=True)
    ]
