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
from .code_statistics import create_code_macros
from .relevance_views import AskedVector, create_frame_views
from .sql_bytes import bytes_of, source_of
from .store import TOKEN_ROWS_SCHEMA, embedding_layout
from .token_file import HIGH, LEVEL, LOW, TokenLayout, from_planes

# Clips and what a condition on them may also name.
CLIPS_WITH_VIDEOS = """(select c.*, v.uri, v.caption, v.metadata from clips c left join videos v using (video_id))"""


def create_views(
    connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], info: CacheInfo, asked: AskedVector
) -> None:
    """Temporary views: tokens_<name> per product, levels_<name> where tokens are codes, and tokens over all of them;
    embeddings_<name>, masks, trajectories and video_trajectories; and the macros code_usage(name) and
    code_statistics(name).
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
    create_frame_views(connection, files, info, asked)
    create_code_macros(connection)


def _create_token_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], entry: ProductInfo
) -> None:
    tokenizer = entry.tokenizer or {}
    schema, tokens = TOKEN_ROWS_SCHEMA, f"{LOW} as latents"
    if tokenizer["kind"] == "trajectory":
        schema, tokens = TRAJECTORY_TOKENS_SCHEMA, f"{LOW} as vectors"
    source = source_of(connection, f"tokens_{name}", uris, _with_blobs(schema, len(entry.levels)))
    small = ", ".join(schema.names)
    if tokenizer["kind"] == "discrete":
        layout = TokenLayout(
            dtype="uint16", shape=entry.shape, codebook_size=tokenizer["codebook_size"], levels=entry.levels
        )
        tokens = f"{_create_codes_of(connection, name, layout)} as codes"
        by_level = [f"select {small}, 1 as level, {tokens} from {source}"]
        if layout.levels:
            codes = _create_codes_of_levels(connection, name, layout)
            by_level = [
                f"select {small}, {n} as level, {one} as codes from {source}" for n, one in enumerate(codes, start=1)
            ]
        connection.execute(f"create temp view levels_{name} as {' union all '.join(by_level)}")
    connection.execute(f"create temp view tokens_{name} as select {small}, {tokens} from {source}")


def _create_codes_of(connection: duckdb.DuckDBPyConnection, name: str, layout: TokenLayout) -> str:
    """What a view selects for the codes of a product, as TokenCache.read has them; makes the function of it."""
    function, columns = f"codes_of_{name}", list(layout.widths)
    if layout.levels:  # one parameter for any number of levels
        parameters: list[Any] = [connection.list_type(BLOB)]
        body, arguments = _codes_of_all_levels(layout), f"[{', '.join(columns)}]"
    else:
        parameters = [BLOB for _ in columns]
        body, arguments = _codes_function(layout), ", ".join(columns)
    connection.create_function(function, body, parameters, connection.list_type(INTEGER), type=ARROW)
    return f"{function}({arguments})"


def _create_codes_of_levels(connection: duckdb.DuckDBPyConnection, name: str, layout: TokenLayout) -> list[str]:
    """As `_create_codes_of`, for the codes of each level alone."""
    parameters: list[Any] = [BLOB]
    selected = []
    for n, grid in enumerate(layout.levels, start=1):
        alone, function = TokenLayout(dtype="uint16", shape=grid, codebook_size=1 << 16), f"level_{n}_of_{name}"
        connection.create_function(
            function, _codes_function(alone), parameters, connection.list_type(INTEGER), type=ARROW
        )
        selected.append(f"{function}({LEVEL}{n})")
    return selected


def _create_embedding_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], entry: ProductInfo
) -> None:
    """The embeddings as FLOAT arrays, which array_cosine_similarity takes."""
    layout, function = embedding_layout(entry.shape[0]), f"embedding_of_{name}"

    def embedding(stored: pa.Array) -> pa.Array:
        values = bytes_of(stored).view("<f4")
        return pa.FixedSizeListArray.from_arrays(values, entry.shape[0])

    parameters: list[Any] = [BLOB]
    kind = connection.array_type(FLOAT, layout.num_values)
    connection.create_function(function, embedding, parameters, kind, type=ARROW)
    source = source_of(connection, f"embeddings_{name}", uris, _with_blobs(TOKEN_ROWS_SCHEMA))
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
        f" from {source_of(connection, f'masks_{name}', uris, MASK_SCHEMA)}"
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


def _with_blobs(schema: pa.Schema, num_levels: int = 0) -> pa.Schema:
    names = [LOW, HIGH, *(f"{LEVEL}{n}" for n in range(1, 1 + num_levels))]
    return pa.schema([*schema, *(pa.field(name, pa.binary()) for name in names)])


def _codes_function(layout: TokenLayout) -> Callable[..., pa.Array]:
    """A vectorised function of the stored planes of many clips, giving the list of codes of each."""

    def codes(*columns: pa.Array) -> pa.Array:
        planes = {
            name: bytes_of(column).reshape(len(column), width)
            for (name, width), column in zip(layout.widths.items(), columns, strict=True)
        }
        values = from_planes(planes, layout).reshape(-1)
        offsets = np.arange(len(columns[0]) + 1, dtype=np.int32) * layout.num_values
        return pa.ListArray.from_arrays(offsets, values)

    # DuckDB counts the parameters of the function that it is given.
    return (lambda low, high: codes(low, high)) if layout.high_bits else (lambda low: codes(low))


def _codes_of_all_levels(layout: TokenLayout) -> Callable[[pa.Array], pa.Array]:
    """As `_codes_function`, of one column with the planes of all levels in a list."""
    ends = np.cumsum(list(layout.widths.values()))

    def codes(lists: pa.Array | pa.ChunkedArray) -> pa.Array:
        joined = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
        stored = bytes_of(joined.flatten()).reshape(len(lists), ends[-1])
        planes = dict(zip(layout.widths, np.split(stored, ends[:-1], axis=1), strict=True))
        offsets = np.arange(len(lists) + 1, dtype=np.int32) * layout.num_values
        return pa.ListArray.from_arrays(offsets, from_planes(planes, layout).reshape(-1))

    return codes
