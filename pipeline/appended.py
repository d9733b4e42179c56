"""Tables of a cache that only grow: numbered Parquet files, each created if it is absent and never edited.

Whoever adds rows reads what is there, writes what is lacking as the next number, and looks again where another process
was first: no row is there twice, and a killed process leaves whole files alone.
"""

import io
import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import CacheError
from ..schemas.tables import with_format
from .storage import Folder

log = logging.getLogger(__name__)

REMADE = "delete it; what it held is made again"
REMEDIES = {  # of tables that nothing here makes again
    "labels": "restore it from a copy, or delete it and import its labels again",
    "policies": "restore it from a copy, or delete it and import its labels again",
    "verdicts": "restore it from a copy, or delete it and let the judge decide again",
}


def append(folder: Folder, table: str, lacking: Callable[[], pa.Table | None]) -> int:
    """Add what `lacking` gives (None or no rows: nothing) to the table in the folder `table`; returns how many rows.

    `lacking` is called again where another process has added rows meanwhile, so it must look at what is there.

    One process alone may add rows in an object store that cannot create a file only if it is absent: of two, one
    would lose its rows without a word. A warning says so once.
    """
    return append_to(folder, table, lambda _: lacking())


def append_to(folder: Folder, table: str, lacking: Callable[[Sequence[str]], pa.Table | None]) -> int:
    """As `append`, where `lacking` is given the files that are there, as `names_in` has them, and need not look."""
    while True:
        names = names_in(folder, table)
        rows = lacking(names)
        if rows is None or not rows.num_rows:
            return 0
        create = folder.create if _is_guarded(folder) else folder.create_unguarded
        if create(f"{table}/{max(map(_number, names), default=0) + 1}.parquet", _bytes_of(rows)):
            return rows.num_rows


@lru_cache(maxsize=64)
def _is_guarded(folder: Folder) -> bool:
    """Whether a file is created once, however many processes race. Local ones are, with hard links or without."""
    if folder.is_local or folder.can_create():
        return True
    log.warning("event=unguarded_append folder=%r remedy='let one process at a time add rows there'", folder.url)
    return False


def names_in(folder: Folder, table: str) -> list[str]:
    """The files of a table, in the order in which they were added."""
    numbered = re.compile(rf"{re.escape(table)}/[0-9]+\.parquet")
    return sorted(filter(numbered.fullmatch, folder.list(table)), key=_number)


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
        remedy = REMEDIES.get(name.split("/")[-2], REMADE)
        raise CacheError(f"{folder.uri(name)}: damaged ({reason}): {remedy}") from None


class Keys:
    """The different values that `columns` have together in a table; a file that was read is not read again."""

    def __init__(self, folder: Folder, table: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        self.folder, self.table, self.schema, self.columns = folder, table, schema, list(columns)
        self._found: set[tuple[Any, ...]] = set()
        self._files_read: set[str] = set()

    def __contains__(self, values: tuple[Any, ...]) -> bool:
        """Whether they were there at the last look: `read`, or `append`."""
        return values in self._found

    def read(self) -> set[tuple[Any, ...]]:
        """All of them as of now."""
        self._take(names_in(self.folder, self.table))
        return self._found

    def append(self, lacking: Callable[[], pa.Table | None]) -> int:
        """Add what `lacking` gives, as `append` does, after a look at what is there; returns how many rows."""

        def lacking_now(names: Sequence[str]) -> pa.Table | None:
            self._take(names)
            return lacking()

        return append_to(self.folder, self.table, lacking_now)

    def _take(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._files_read:
                rows = read_rows(self.folder, name, self.schema, self.columns).group_by(self.columns).aggregate([])
                self._found.update(zip(*(rows[column].to_pylist() for column in self.columns), strict=True))
                self._files_read.add(name)


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
