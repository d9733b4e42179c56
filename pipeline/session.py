"""One connection to a cache's index and views, made when it is first asked, in whatever process that is."""

import os
import threading
from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from ..schemas.cache_info import CacheInfo
from ..schemas.errors import CacheError
from ..schemas.snapshot import Snapshot
from .index import connect, ensure_index, file_uris
from .relevance_views import NAMES_RELEVANCE, AskedVector, create_relevance_views
from .storage import Folder
from .views import create_views

_inherited: list[Any] = []  # connections of the process that this one was forked from: closing them would wait for it


class Session:
    """Answers queries about what was committed when it was first asked, or about what a snapshot pinned."""

    def __init__(self, folder: Folder, info: CacheInfo, pinned: Snapshot | None) -> None:
        self._folder, self._info, self._pinned = folder, info, pinned
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._sees_relevance = False
        self._asked = AskedVector(np.zeros(1, np.float32))

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """As TokenCache.sql."""
        try:
            statements = self._connected().extract_statements(query)
        except duckdb.Error as error:
            raise _failed(error) from None
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            found = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise CacheError(f"one read-only query is accepted (select, from, describe), found: {found}")
        if not self._sees_relevance and NAMES_RELEVANCE.search(query):
            self.refresh()
        return self.answer(query, parameters)

    def answer(
        self, query: str, parameters: Sequence[Any] = (), *, vector_D: np.ndarray | None = None, **tables: pa.Table
    ) -> pa.Table:
        """The answer of one query, which may also use the Arrow `tables` given, and views ``scored_<name>`` by the
        embedding `vector_D`; one at a time, from any thread.

        CacheError says what DuckDB has against it.
        """
        connection = self._connected()
        with self._lock:
            if vector_D is not None:
                self._asked.value_D = vector_D
            for name, table in tables.items():
                connection.register(name, table)
            try:
                return connection.sql(query, params=list(parameters)).to_arrow_table()
            except duckdb.Error as error:
                raise _failed(error) from None
            finally:
                for name in tables:
                    connection.unregister(name)

    def refresh(self) -> None:
        """See what was added below relevance/ until now."""
        connection = self._connected()
        with self._lock:
            try:
                create_relevance_views(connection, self._folder, self._info)
            except duckdb.Error as error:
                raise _failed(error) from None
            self._sees_relevance = True

    def _connected(self) -> duckdb.DuckDBPyConnection:
        if self._pid != os.getpid():  # forked: the connection's threads have stayed with the parent
            _inherited.append(self._connection)
            self._connection, self._sees_relevance = None, False
            self._lock, self._pid = threading.RLock(), os.getpid()
        with self._lock:
            self._connection = self._connection or self._connect()
            return self._connection

    def _connect(self) -> duckdb.DuckDBPyConnection:
        index = ensure_index(self._folder, self._pinned)
        connection = connect(self._folder)
        quoted = index.replace("'", "''")
        try:
            connection.execute(f"attach '{quoted}' as idx (read_only); use idx")
            files = {product: file_uris(connection, self._folder, product) for product in self._info.products}
            create_views(connection, files, self._info, self._asked)
        except duckdb.Error as error:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise CacheError(
                f"{self._folder.url}: a data file cannot be read ({reason}): tokenmill verify names what is damaged"
            ) from None
        return connection


def _failed(error: duckdb.Error) -> CacheError:
    return CacheError(f"the query failed: {' '.join(str(error).partition(chr(10) * 2)[0].split())}")
