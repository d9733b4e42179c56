"""What views select from, and the bytes of what they select."""

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa


def source_of(connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], schema: pa.Schema) -> str:
    """What to select from: the files, or an empty table of their columns where there are none."""
    if uris:
        listed = ", ".join("'" + uri.replace("'", "''") + "'" for uri in uris)
        return f"read_parquet([{listed}])"
    connection.register(f"none_in_{name}", schema.empty_table())
    return f"none_in_{name}"


def bytes_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """All bytes of a binary column, one value after the other."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)
    data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
    return data[offsets[0] : offsets[-1]]
