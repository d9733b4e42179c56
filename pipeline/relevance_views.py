"""The SQL views over frames, queries, and what is known of frames for them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import duckdb
import numpy as np
import pyarrow as pa
import torch
from duckdb.func import ARROW
from duckdb.sqltypes import BLOB, FLOAT

from ..schemas.cache_info import CacheInfo
from ..schemas.shard import FRAMES
from ..schemas.tables import (
    FRAME_SCHEMA,
    LABEL_SCHEMA,
    POLICY_SCHEMA,
    QUERY_EMBEDDING_SCHEMA,
    QUERY_SCHEMA,
    SCORE_SCHEMA,
    SCORER_SCHEMA,
    VERDICT_SCHEMA,
)
from .appended import names_in, read_table
from .frame_file import embedded_schema
from .relevance import ALIKE, KnownEncoder, encoders_of, unit
from .sql_bytes import bytes_of, source_of
from .storage import Folder
from .store import TOKEN_ROWS_SCHEMA
from .token_file import LEVEL

RELEVANCE = "relevance"
FIRST_LEVEL = f"{LEVEL}1"
TABLES = {
    "queries": QUERY_SCHEMA,
    "query_embeddings": QUERY_EMBEDDING_SCHEMA,
    "labels": LABEL_SCHEMA,
    "policies": POLICY_SCHEMA,
    "verdicts": VERDICT_SCHEMA,
}
# A query that names one of these views; they are made when it comes, since readers of tokens need none of them.
NAMES_RELEVANCE = re.compile(
    r"\b(queries|query_embeddings|scorers|relevance|relevance_history|labels|policies|verdicts)\b", re.I
)
SCORES, SCORERS = f"{RELEVANCE}/scores", f"{RELEVANCE}/scorers"


@dataclass(slots=True)
class AskedVector:
    """The embedding (D,) that ``raw_of_<name>`` compares frames with: who asks sets it, under the session's lock."""

    value_D: np.ndarray


def create_frame_views(
    connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], info: CacheInfo, asked: AskedVector
) -> None:
    """``frames``, one row per candidate frame, and ``frames_<name>`` with their embeddings as FLOAT arrays.

    ``scored_<name>`` has the cosine to the vector `asked` for in their place: a fifth faster than by embeddings.
    """
    for product, entry in info.products.items():
        if product == FRAMES:
            source = source_of(connection, "frames", files[product], FRAME_SCHEMA)
            connection.execute(
                f"create temp view frames as select clip_id, video_id, f.*"
                f" from (select clip_id, video_id, unnest(frames) as f from {source})"
            )
        if entry.encoder:
            _create_embedded_views(connection, product.partition("/")[2], files[product], entry.shape[0], asked)
    for name, encoder in encoders_of(info).items():
        if not encoder.has_embeddings:
            _create_coded_view(connection, name, files[encoder.product], encoder.spec["dim"], _layout(info, encoder))


def _create_embedded_views(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], dim: int, asked: AskedVector
) -> None:
    def of_length_1(stored: pa.Array | pa.ChunkedArray) -> torch.Tensor:
        values_ND = torch.from_numpy(bytes_of(stored).view("<f2").copy()).float().reshape(-1, dim)
        lengths_N1 = torch.linalg.vector_norm(values_ND, dim=1, keepdim=True)
        return values_ND.div_(lengths_N1.clamp_min_(1e-12))  # float16 has made them a little longer or shorter

    def embedding(stored: pa.Array) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(of_length_1(stored).numpy().reshape(-1), dim)

    def raw(lists: pa.Array | pa.ChunkedArray) -> pa.Array:
        joined = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        raw_N = (of_length_1(joined.flatten()) @ torch.from_numpy(asked.value_D)).numpy()
        ends = np.cumsum([0, *joined.value_lengths().to_numpy()], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(raw_N))

    connection.create_function(
        f"raw_of_{name}", raw, [connection.list_type(BLOB)], connection.list_type(FLOAT), type=ARROW
    )
    connection.create_function(
        f"frame_embedding_of_{name}", embedding, [BLOB], connection.array_type(FLOAT, dim), type=ARROW
    )
    source = source_of(connection, f"frames_{name}", uris, embedded_schema(dim))
    connection.execute(f"""
        create temp view frames_{name} as
        select clip_id, video_id, frame, pts_s, frame_embedding_of_{name}(stored) as embedding
        from (select clip_id, video_id, unnest(frames) as frame, unnest(pts_s) as pts_s, unnest(embeddings) as stored
              from {source});
        create temp view scored_{name} as
        select clip_id, video_id, unnest(frames) as frame, unnest(pts_s) as pts_s,
               unnest(raw_of_{name}(embeddings)) as raw
        from {source}""")


def _layout(info: CacheInfo, encoder: KnownEncoder) -> tuple[tuple[int, ...], int]:
    """The (t,h,w) grid of a product's first level, and how many frames share its second latent.

    Frame 0 has a latent of its own, then as many share one as the stride is, a power of two that both lengths tell.
    """
    num_latents, *_ = grid = info.products[encoder.product].levels[0]
    later = info.recipe["clips"]["num_frames"] - 1
    stride = next(1 << n for n in range(32) if -(-later // (1 << n)) <= num_latents - 1 or later <= 0)
    return tuple(grid), stride


def _create_coded_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], dim: int, layout: tuple[tuple[int, ...], int]
) -> None:
    """The mean signs of the bits of the first level's codes, at length 1, as embeddings of a latent's frames."""
    grid, stride = layout

    def bits(stored: pa.Array) -> pa.Array:
        codes_Nts = bytes_of(stored).view("<u2").reshape(-1, grid[0], math.prod(grid[1:]))
        means = [((codes_Nts >> bit) & 1).mean(-1, dtype=np.float32) * 2 - 1 for bit in reversed(range(dim))]
        vectors = unit(np.stack(means, -1).reshape(-1, dim))
        arrays = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dim)
        return pa.ListArray.from_arrays(np.arange(len(codes_Nts) + 1, dtype=np.int32) * grid[0], arrays)

    vectors = connection.list_type(connection.array_type(FLOAT, dim))
    connection.create_function(f"bits_of_{name}", bits, [BLOB], vectors, type=ARROW)
    stored = pa.schema([*TOKEN_ROWS_SCHEMA, pa.field(FIRST_LEVEL, pa.binary())])
    source = source_of(connection, f"bits_of_{name}", uris, stored)
    connection.execute(f"""
        create temp view frames_{name} as
        select clip_id, video_id, frame::integer as frame, frame_pts_s[frame + 1] as pts_s,
               vectors[(frame + {stride - 1}) // {stride} + 1] as embedding
        from (select c.clip_id, video_id, frame_pts_s, bits_of_{name}({FIRST_LEVEL}) as vectors,
                     unnest(range(c.num_valid::bigint)) as frame
              from {source} t join clips c using (clip_id))""")


def create_relevance_views(connection: duckdb.DuckDBPyConnection, folder: Folder, info: CacheInfo) -> None:
    """``queries``, ``query_embeddings``, ``labels``, ``policies``, ``verdicts``, ``scorers``, ``relevance_history``
    with the scores of all versions, and ``relevance`` with those of current ones and their p; as the files are now.
    """
    for name, schema in TABLES.items():
        uris = [folder.uri(file) for file in names_in(folder, f"{RELEVANCE}/{name}")]
        connection.execute(f"create or replace temp view {name} as from {source_of(connection, name, uris, schema)}")
    scorers = {file.rpartition("/")[0] for file in folder.list(SCORES)}
    uris = [folder.uri(file) for scorer in sorted(scorers) for file in names_in(folder, scorer)]
    source = source_of(connection, "scores", uris, SCORE_SCHEMA)
    connection.execute(f"create or replace temp view relevance_history as from {source}")
    connection.register("scorer_rows", scorer_rows(folder, info))
    connection.execute("create or replace temp table scorers as from scorer_rows")
    connection.unregister("scorer_rows")
    # The rule of calibrated() in relevance.py.
    connection.execute(f"""
        create or replace temp view relevance as
        select query_id, scorer, version, video_id, clip_id, frame, raw,
               1 / (1 + exp(-(scale * if(rule = 'sigmoid', raw::double, apart) + bias))) as p
        from (select r.*, rule, scale, bias,
                     coalesce((raw - avg(raw) over video)
                              / if(stddev_pop(raw) over video > {ALIKE}, stddev_pop(raw) over video, null), 0) as apart
              from relevance_history r join scorers s using (scorer, version)
              where s.is_current and clip_id in (select clip_id from clips)
              window video as (partition by query_id, scorer, version, video_id))""")


def scorer_rows(folder: Folder, info: CacheInfo) -> pa.Table:
    """Every scorer that has scored frames, or can: SCORER_SCHEMA, and whether it is the current version.

    Encoders are calibrated as their recipe says now; of other scorers the last version is the current one.
    """
    encoders = encoders_of(info)
    rows = {(row["scorer"], row["version"]): row for row in read_table(folder, SCORERS, SCORER_SCHEMA).to_pylist()}
    newest = {scorer: version for scorer, version in rows}
    for name, encoder in encoders.items():
        newest[name] = encoder.version
        rows[name, encoder.version] = {
            "scorer": name,
            "version": encoder.version,
            **asdict(encoder.calibration),
            "spec": json.dumps(dict(encoder.spec), sort_keys=True),
        }
    listed = [{**row, "is_current": newest[row["scorer"]] == row["version"]} for row in rows.values()]
    return pa.Table.from_pylist(listed, schema=pa.schema([*SCORER_SCHEMA, pa.field("is_current", pa.bool_())]))
