"""Tables of a cache that only grow: numbered Parquet files, each created if it is absent and never edited.

Whoever adds rows reads what is there, writes what is lacking as the next number, and looks again where another process
was first: no row is there twice, and a killed process leaves whole files alone.
"""

import io
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import CacheError
from ..schemas.tables import with_format
from .storage import Folder


def append(folder: Folder, table: str, lacking: Callable[[], pa.Table | None]) -> int:
    """Add what `lacking` gives (None or no rows: nothing) to the table in the folder `table`; returns how many rows.

    `lacking` is called again where another process has added rows meanwhile, so it must look at what is there.
    """
    create = None
    while True:
        numbers = [_number(name) for name in names_in(folder, table)]
        rows = lacking()
        if rows is None or not rows.num_rows:
            return 0
        create = create or (folder.create if folder.can_create() else folder.create_unguarded)
        if create(f"{table}/{max(numbers, default=0) + 1}.parquet", _bytes_of(rows)):
            return rows.num_rows


def names_in(folder: Folder, table: str) -> list[str]:
    """The files of a table, in the order in which they were added."""
    names = [name for name in folder.list(table) if name.endswith(".parquet") and name.count("/") == table.count("/") + 1]
    return sorted(names, key=_number)


def read_table(folder: Folder, table: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a table, or `columns` of them; CacheError where a file is damaged."""
    parts = [schema.empty_table().select(columns or schema.names)]
    for name in names_in(folder, table):
        try:
            parts.append(
                pq.read_table(io.BytesIO(folder.read(name)), columns=list(columns or schema.names)).cast(parts[0].schema)
            )
        except (pa.ArrowException, OSError) as error:
            raise CacheError(f"{folder.uri(name)}: damaged ({error}): delete it; what it held is made again") from None
    return pa.concat_tables(parts)


def _number(name: str) -> int:
    stem = name.rpartition("/")[2].removesuffix(".parquet")
    return int(stem) if stem.isdigit() else 0


def _bytes_of(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        rows.cast(with_format(rows.schema)), buffer, compression="zstd", write_page_checksum=True, row_group_size=1 << 20
    )
    return buffer.getvalue()
