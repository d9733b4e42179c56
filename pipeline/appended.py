"""Tables of a cache that only grow: numbered Parquet files, each created if it is absent and never edited.

Whoever adds rows reads what is there, writes what is lacking as the next number, and looks again where another process
was first: no row is there twice, and a killed process leaves whole files alone.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

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
    names = [
        name for name in folder.list(table) if name.endswith(".parquet") and name.count("/") == table.count("/") + 1
    ]
    return sorted(names, key=_number)


def read_table(folder: Folder, table: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a table, or `columns` of them; CacheError where a file is damaged."""
    none = schema.empty_table().select(columns or schema.names)
    return pa.concat_tables([none, *(read_rows(folder, name, schema, columns) for name in names_in(folder, table))])


def read_rows(folder: Folder, name: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one file of a table, or `columns` of them; CacheError where it is damaged."""
    wanted = schema.empty_table().select(columns or schema.names).schema
    stored = io.BytesIO(folder.read(name))
    try:
        return pq.read_table(stored, columns=wanted.names, page_checksum_verification=True).cast(wanted)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CacheError(f"{folder.uri(name)}: damaged ({reason}): delete it; what it held is made again") from None


class Keys:
    """The different values that `columns` have together in a table; a file that was read is not read again."""

    def __init__(self, folder: Folder, table: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        self.folder, self.table, self.schema, self.columns = folder, table, schema, list(columns)
        self._found: set[tuple[Any, ...]] = set()
        self._files_read: set[str] = set()

    def read(self) -> set[tuple[Any, ...]]:
        """All of them as of now."""
        for name in names_in(self.folder, self.table):
            if name not in self._files_read:
                rows = read_rows(self.folder, name, self.schema, self.columns).group_by(self.columns).aggregate([])
                self._found.update(zip(*(rows[column].to_pylist() for column in self.columns), strict=True))
                self._files_read.add(name)
        return self._found


def _number(name: str) -> int:
    stem = name.rpartition("/")[2].removesuffix(".parquet")
    return int(stem) if stem.isdigit() else 0


def _bytes_of(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        rows.cast(with_format(rows.schema)),
        buffer,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=1 << 20,
    )
    return buffer.getvalue()
