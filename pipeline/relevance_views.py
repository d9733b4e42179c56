"""The SQL views over frames, queries, and what is known of frames for them."""

import json
from collections.abc import Mapping, Sequence

import duckdb
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
from .relevance import ALIKE, calibration_of
from .sql_bytes import bytes_of, source_of
from .storage import Folder

RELEVANCE = "relevance"
TABLES = {
    "queries": QUERY_SCHEMA,
    "query_embeddings": QUERY_EMBEDDING_SCHEMA,
    "labels": LABEL_SCHEMA,
    "policies": POLICY_SCHEMA,
    "verdicts": VERDICT_SCHEMA,
}
SCORES, SCORERS = f"{RELEVANCE}/scores", f"{RELEVANCE}/scorers"


def create_frame_views(
    connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], info: CacheInfo
) -> None:
    """``frames``, one row per candidate frame, and ``frames_<name>`` with their embeddings as FLOAT arrays."""
    for product, entry in info.products.items():
        if product == FRAMES:
            source = source_of(connection, "frames", files[product], FRAME_SCHEMA)
            connection.execute(
                f"create temp view frames as select clip_id, video_id, f.*"
                f" from (select clip_id, video_id, unnest(frames) as f from {source})"
            )
        if entry.encoder:
            _create_embedded_view(connection, product.partition("/")[2], files[product], entry.shape[0])


def _create_embedded_view(connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], dim: int) -> None:
    def embedding(stored: pa.Array) -> pa.Array:
        values = torch.from_numpy(bytes_of(stored).view("<f2").copy()).float().numpy()
        return pa.FixedSizeListArray.from_arrays(values, dim)

    connection.create_function(
        f"frame_embedding_of_{name}", embedding, [BLOB], connection.array_type(FLOAT, dim), type=ARROW
    )
    source = source_of(connection, f"frames_{name}", uris, embedded_schema(dim))
    connection.execute(f"""
        create temp view frames_{name} as
        select clip_id, video_id, frame, pts_s, frame_embedding_of_{name}(stored) as embedding
        from (select clip_id, video_id, unnest(frames) as frame, unnest(pts_s) as pts_s, unnest(embeddings) as stored
              from {source})""")


def create_relevance_views(connection: duckdb.DuckDBPyConnection, folder: Folder, info: CacheInfo) -> None:
    """``queries``, ``query_embeddings``, ``labels``, ``policies``, ``verdicts``, ``scorers``, ``relevance_history``
    with the scores of all versions, and ``relevance`` with those of current ones and their p; as the files are now.
    """
    for name, schema in TABLES.items():
        uris = [folder.uri(file) for file in names_in(folder, f"{RELEVANCE}/{name}")]
        connection.execute(f"create or replace temp view {name} as from {source_of(connection, name, uris, schema)}")
    uris = [folder.uri(file) for file in folder.list(SCORES) if file.endswith(".parquet")]
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
              from relevance_history r join scorers s using (scorer, version) where s.is_current
              window video as (partition by query_id, scorer, version, video_id))""")


def scorer_rows(folder: Folder, info: CacheInfo) -> pa.Table:
    """Every scorer that has scored frames, or can: SCORER_SCHEMA, and whether it is the current version.

    Encoders are calibrated as their recipe says now; of other scorers the last version is the current one.
    """
    rows = {(row["scorer"], row["version"]): row for row in read_table(folder, SCORERS, SCORER_SCHEMA).to_pylist()}
    newest = {scorer: version for scorer, version in rows}
    for product, entry in info.products.items():
        if entry.encoder:
            name, calibration = product.partition("/")[2], calibration_of(entry)
            newest[name] = entry.fingerprint
            rows[name, entry.fingerprint] = {
                "scorer": name,
                "version": entry.fingerprint,
                "rule": calibration.rule,
                "scale": calibration.scale,
                "bias": calibration.bias,
                "spec": json.dumps(entry.encoder, sort_keys=True),
            }
    listed = [{**row, "is_current": newest[row["scorer"]] == row["version"]} for row in rows.values()]
    return pa.Table.from_pylist(listed, schema=pa.schema([*SCORER_SCHEMA, pa.field("is_current", pa.bool_())]))
