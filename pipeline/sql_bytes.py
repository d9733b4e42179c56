"""What views select from, and the bytes of what they select."""

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa


def source_of(connection: duckdb.DuckDBPyConnection, name: str, uris: Sequence[str], schema: pa.Schema) -> str:
    """What to select from: the files, or an empty table of their columns where there are none.

    A variable of the connection lists the files. As a part of the query 100,000 of them are parsed for a second each
    time that a view is used; in a variable they take 25 ms.
    """
    if uris:
        variable = f"files_of_{name}"
        connection.register("listed_files", pa.table({"uri": pa.array(uris, pa.string())}))
        connection.execute(f"set variable {variable} = (select list(uri) from listed_files)")
        connection.unregister("listed_files")
        return f"read_parquet(getvariable('{variable}'), hive_partitioning = false)"
    connection.register(f"none_in_{name}", schema.empty_table())
    return f"none_in_{name}"


def bytes_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """All bytes of a binary column, one value after the other."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)
    data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
    return data[offsets[0] : offsets[-1]]
