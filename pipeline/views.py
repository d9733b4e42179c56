"""The SQL views over token files, and the functions that turn stored bytes into lists of codes."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import ARROW
from duckdb.sqltypes import BLOB, FLOAT, INTEGER

from ..schemas.cache_info import CacheInfo, ProductInfo
from ..schemas.shard import EMBEDDINGS, FRAMES, MASKS, TOKENS
from ..schemas.tables import MASK_SCHEMA, TRAJECTORY_TOKENS_SCHEMA
from .code_statistics import create_code_macros
from .index import file_uris
from .relevance import encoders_of
from .relevance_views import AskedVector, create_frame_views
from .sql_bytes import bytes_of, source_of
from .storage import Folder
from .store import TOKEN_ROWS_SCHEMA, embedding_layout
from .token_file import HIGH, LEVEL, LOW, TokenLayout, from_planes

# Clips and what a condition on them may also name.
CLIPS_WITH_VIDEOS = """(select c.*, v.uri, v.caption, v.metadata from clips c left join videos v using (video_id))"""

MACROS = "macros"
CODE_MACROS = (
    "code_",
    "static_clips",
    "duplicate_clips",
    "near_duplicates",
    "similar_code_sets",
)  # how names begin; others are made when DuckDB does not know what a query names
# How words begin in queries that are about all views, or about one whose name they make up.
LISTS_VIEWS = ("information_schema", "duckdb_", "pg_", "sqlite_", "show", "pragma", "query_table")


class Views:
    """The temporary views and macros of a connection to an index, each made when a query first names it:
    tokens_<name> per product, levels_<name> where tokens are codes, and tokens over all of them; embeddings_<name>,
    masks, trajectories and video_trajectories; frames, frames_<name> and scored_<name>; and macros over codes.

    `made` are the parts that are there: the views of a product, those of a kind (TOKENS, MASKS, FRAMES), and MACROS.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, folder: Folder, info: CacheInfo, asked: AskedVector
    ) -> None:
        self._connection, self._folder, self._info, self._asked = connection, folder, info, asked
        self._names = _names_of_parts(info)
        self.made: set[str] = set()

    def make_named(self, texts: Sequence[str]) -> None:
        """Make what a query may name, by the words of these texts: its own, and those of its parameters."""
        words = {word for text in texts for word in re.findall(r"\w+", text.lower())}
        if any(word.startswith(LISTS_VIEWS) for word in words):
            self.make_all()
        if any(word.startswith(CODE_MACROS) for word in words):
            self._make(MACROS)
        for part, names in self._names.items():
            if not words.isdisjoint(names):
                self._make(part)

    def make_all(self) -> None:
        """Make all that there is."""
        for part in (*self._names, MACROS):
            self._make(part)

    def _make(self, part: str) -> None:
        if part in self.made:
            return
        connection, info = self._connection, self._info
        if part == MACROS:
            create_code_macros(connection, info)
        elif part == TOKENS:
            self._create_view_of_all_tokens()
        elif part == MASKS:
            products = [product for product in info.products if product.startswith(MASKS)]
            _create_mask_views(connection, {p.removeprefix(MASKS): self._files(p) for p in products})
        elif part == FRAMES:
            create_frame_views(connection, {p: self._files(p) for p in info.products}, info, self._asked)
        elif part.startswith(EMBEDDINGS):
            _create_embedding_view(connection, part.removeprefix(EMBEDDINGS), self._files(part), info.products[part])
        else:
            _create_token_view(connection, part.partition("/")[2], self._files(part), info.products[part])
        self.made.add(part)

    def _create_view_of_all_tokens(self) -> None:
        products = [product for product, entry in self._info.products.items() if entry.tokenizer]
        for product in products:
            self._make(product)
        names = [product.partition("/")[2] for product in products]
        selected = [f"select '{name}' as product, * from temp.tokens_{name}" for name in names]
        self._connection.execute(f"create temp view tokens as {' union all by name '.join(selected)}")

    def _files(self, product: str) -> list[str]:
        return file_uris(self._connection, self._folder, product)


def _names_of_parts(info: CacheInfo) -> dict[str, set[str]]:
    """Words in a query that need a part: names of views, and of products, which macros are given."""
    parts: dict[str, set[str]] = {}
    for product, entry in info.products.items():
        name = product.partition("/")[2]
        if product.startswith(EMBEDDINGS):
            parts[product] = {f"embeddings_{name}"}
        if product.startswith(MASKS):
            parts[MASKS] = {"masks", "trajectories", "video_trajectories"}
        if entry.tokenizer:
            parts[product] = {name, f"tokens_{name}", f"levels_{name}"}
            parts[TOKENS] = {"tokens"}
    encoders = encoders_of(info)
    if FRAMES in info.products or encoders:
        names = {f"{kind}_{name}" for name in encoders for kind in ("frames", "scored")}
        parts[FRAMES] = {"frames", *names}
    return parts


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
