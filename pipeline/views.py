"""The SQL views over token files, and the functions that turn stored bytes into lists of codes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import ARROW
from duckdb.sqltypes import BLOB, FLOAT, INTEGER

from ..schemas.cache_info import CacheInfo, ProductInfo
from ..schemas.shard import EMBEDDINGS, MASKS
from ..schemas.tables import MASK_SCHEMA, TRAJECTORY_TOKENS_SCHEMA
from .store import TOKEN_ROWS_SCHEMA, embedding_layout
from .token_file import HIGH, LOW, TokenLayout, from_planes

# Clips and what a condition on them may also name.
CLIPS_WITH_VIDEOS = """(select c.*, v.uri, v.caption, v.metadata from clips c left join videos v using (video_id))"""


def create_views(connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], info: CacheInfo) -> None:
    """Temporary views: tokens_<name> per product and tokens over all of them, embeddings_<name>, masks, trajectories
    and video_trajectories; and the macro code_usage(name).
    """
    together = []
    for product, entry in info.products.items():
        name = product.partition("/")[2]
        if product.startswith(EMBEDDINGS):
            _create_embedding_view(connection, name, files[product], entry)
        if entry.tokenizer:
            _create_token_view(connection, name, files[product], entry)
            together.append(f"select '{name}' as product, * from temp.tokens_{name}")
    if together:
        connection.execute(f"create temp view tokens as {' union all by name '.join(together)}")
    masks = {product.removeprefix(MASKS): uris for product, uris in files.items() if product.startswith(MASKS)}
    _create_mask_views(connection, masks)
    connection.execute(
        """create temp macro code_usage(name) as table
           select code, count(*) as uses from (select unnest(codes) as code from query_table('tokens_' || name))
           group by code order by code"""
    )


def _create_token_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], entry: ProductInfo
) -> None:
    tokenizer = entry.tokenizer or {}
    schema, tokens = TOKEN_ROWS_SCHEMA, f"{LOW} as latents"
    if tokenizer["kind"] == "trajectory":
        schema, tokens = TRAJECTORY_TOKENS_SCHEMA, f"{LOW} as vectors"
    elif tokenizer["kind"] == "discrete":
        layout = TokenLayout(dtype="uint16", shape=entry.shape, codebook_size=tokenizer["codebook_size"])
        columns = [LOW, HIGH] if layout.high_bits else [LOW]
        function = f"codes_of_{name}"
        parameters: list[Any] = [BLOB for _ in columns]
        connection.create_function(
            function, _codes_function(layout), parameters, connection.list_type(INTEGER), type=ARROW
        )
        tokens = f"{function}({', '.join(columns)}) as codes"
    source = _source(connection, f"tokens_{name}", uris, _with_blobs(schema))
    connection.execute(f"create temp view tokens_{name} as select {', '.join(schema.names)}, {tokens} from {source}")


def _create_embedding_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], entry: ProductInfo
) -> None:
    """The embeddings as FLOAT arrays, which array_cosine_similarity takes."""
    layout, function = embedding_layout(entry.shape[0]), f"embedding_of_{name}"

    def embedding(stored: pa.Array) -> pa.Array:
        values = _bytes_of(stored).view("<f4")
        return pa.FixedSizeListArray.from_arrays(values, entry.shape[0])

    parameters: list[Any] = [BLOB]
    kind = connection.array_type(FLOAT, layout.num_values)
    connection.create_function(function, embedding, parameters, kind, type=ARROW)
    source = _source(connection, f"embeddings_{name}", uris, _with_blobs(TOKEN_ROWS_SCHEMA))
    small = ", ".join(TOKEN_ROWS_SCHEMA.names)
    connection.execute(
        f"create temp view embeddings_{name} as select {small}, {function}({LOW}) as embedding from {source}"
    )


def _create_mask_views(connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]]) -> None:
    """All clips with masks; their trajectories; and trajectories as they go on over the clips of a video."""
    if not files:
        return
    together = [
        f"select '{name}' as product, * exclude (masks, graph)"
        f" from {_source(connection, f'masks_{name}', uris, MASK_SCHEMA)}"
        for name, uris in files.items()
    ]
    connection.execute(f"create temp view masks as {' union all by name '.join(together)}")
    connection.execute("""
        create temp view trajectories as
        select product, clip_id, video_id, (row - 1)::integer as row, t.*, t.end_s - t.start_s as duration_s,
               t.area / (num_valid::bigint * height * width) as area_share
        from (select *, unnest(trajectories) as t, generate_subscripts(trajectories, 1) as row from temp.masks);
        create temp view video_trajectories as
        select product, video_id, trajectory_id, count(*) as num_clips, sum(num_frames)::bigint as num_frames,
               sum(area)::bigint as area, min(start_s) as start_s, max(end_s) as end_s,
               max(end_s) - min(start_s) as duration_s
        from trajectories group by product, video_id, trajectory_id""")


def _source(connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], schema: pa.Schema) -> str:
    """What to select from: the files, or an empty table of their columns where there are none."""
    if uris:
        listed = ", ".join("'" + uri.replace("'", "''") + "'" for uri in uris)
        return f"read_parquet([{listed}])"
    connection.register(f"none_in_{name}", schema.empty_table())
    return f"none_in_{name}"


def _with_blobs(schema: pa.Schema) -> pa.Schema:
    return schema.append(pa.field(LOW, pa.binary())).append(pa.field(HIGH, pa.binary()))


def _codes_function(layout: TokenLayout) -> Callable[..., pa.Array]:
    """A vectorised function of the stored planes of many clips, giving the list of codes of each."""

    def codes(*columns: pa.Array) -> pa.Array:
        planes = {
            name: _bytes_of(column).reshape(len(column), width)
            for (name, width), column in zip(layout.widths.items(), columns, strict=True)
        }
        values = from_planes(planes, layout).reshape(-1)
        offsets = np.arange(len(columns[0]) + 1, dtype=np.int32) * layout.num_values
        return pa.ListArray.from_arrays(offsets, values)

    # DuckDB counts the parameters of the function that it is given.
    return (lambda low, high: codes(low, high)) if layout.high_bits else (lambda low: codes(low))


def _bytes_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """All bytes of a binary column, one value after the other."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)
    data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
    return data[offsets[0] : offsets[-1]]
