"""The SQL views over token files, and the functions that turn stored bytes into lists of codes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import ARROW
from duckdb.sqltypes import BLOB, INTEGER

from ..schemas.cache_info import CacheInfo, ProductInfo
from .store import TOKEN_ROWS_SCHEMA
from .token_file import HIGH, LOW, TokenLayout, from_planes

# Clips and what a condition on them may also name.
CLIPS_WITH_VIDEOS = """(select c.*, v.uri, v.caption, v.metadata from clips c left join videos v using (video_id))"""


def create_views(connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]], info: CacheInfo) -> None:
    """One temporary view tokens_<name> per product, tokens over all of them, and the macro code_usage(name)."""
    together = []
    for product, entry in info.products.items():
        if not entry.tokenizer:
            continue
        name = product.removeprefix("tokens/")
        _create_token_view(connection, name, files[product], entry)
        together.append(f"select '{name}' as product, * from temp.tokens_{name}")
    if together:
        connection.execute(f"create temp view tokens as {' union all by name '.join(together)}")
    connection.execute(
        """create temp macro code_usage(name) as table
           select code, count(*) as uses from (select unnest(codes) as code from query_table('tokens_' || name))
           group by code order by code"""
    )


def _create_token_view(
    connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], entry: ProductInfo
) -> None:
    tokenizer = entry.tokenizer or {}
    if tokenizer["kind"] == "discrete":
        layout = TokenLayout(dtype="uint16", shape=entry.shape, codebook_size=tokenizer["codebook_size"])
        columns = [LOW, HIGH] if layout.high_bits else [LOW]
        function = f"codes_of_{name}"
        parameters: list[Any] = [BLOB for _ in columns]
        connection.create_function(
            function, _codes_function(layout), parameters, connection.list_type(INTEGER), type=ARROW
        )
        tokens = f"{function}({', '.join(columns)}) as codes"
    else:
        tokens = f"{LOW} as latents"
    small = ", ".join(TOKEN_ROWS_SCHEMA.names)
    if uris:
        listed = ", ".join("'" + uri.replace("'", "''") + "'" for uri in uris)
        source = f"read_parquet([{listed}])"
    else:
        source = f"(select ''::varchar as clip_id, 0::uinteger as num_valid, ''::blob as {LOW}, ''::blob as {HIGH})"
    where = "" if uris else " where false"
    connection.execute(f"create temp view tokens_{name} as select {small}, {tokens} from {source}{where}")


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
