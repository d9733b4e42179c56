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
from .index import open_index
from .relevance_views import NAMES_RELEVANCE, AskedVector, create_relevance_views
from .storage import Folder
from .views import Views

_inherited: list[Any] = []  # connections of the process that this one was forked from: closing them would wait for it


class Session:
    """Answers queries about what was committed when it was first asked, or about what a snapshot pinned."""

    def __init__(self, folder: Folder, info: CacheInfo, pinned: Snapshot | None) -> None:
        self._folder, self._info, self._pinned = folder, info, pinned
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._sees_relevance = False
        self._asked = AskedVector(np.zeros(1, np.float32))
        self._views: Views | None = None

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
                return self._answer(connection, query, parameters)
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

    def _answer(self, connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any]) -> pa.Table:
        """The answer of a query once the views that it names are there."""
        texts = [text for text in (query, *parameters) if isinstance(text, str)]
        self._make_views(connection, texts)
        try:
            return connection.sql(query, params=list(parameters)).to_arrow_table()
        except duckdb.CatalogException:  # a macro may need others; and what there is belongs into the error
            self._make_views(connection, None)
            return connection.sql(query, params=list(parameters)).to_arrow_table()

    def _make_views(self, connection: duckdb.DuckDBPyConnection, texts: Sequence[str] | None) -> None:
        """Make the views that these texts name, or all."""
        self._views = self._views or Views(connection, self._folder, self._info, self._asked)
        try:
            self._views.make_all() if texts is None else self._views.make_named(texts)
        except duckdb.Error as error:
            self._connection = self._views = None  # the views of a part may be there by halves
            reason = " ".join(str(error).partition("\n")[0].split())
            raise CacheError(
                f"{self._folder.url}: a data file cannot be read ({reason}): tokenmill verify names what is damaged"
            ) from None

    def _connected(self) -> duckdb.DuckDBPyConnection:
        if self._pid != os.getpid():  # forked: the connection's threads have stayed with the parent
            _inherited.append(self._connection)
            self._connection, self._views, self._sees_relevance = None, None, False
            self._lock, self._pid = threading.RLock(), os.getpid()
        with self._lock:
            if self._connection is None:
                self._sees_relevance = False
                self._connection = open_index(self._folder, self._pinned)
            return self._connection


def _failed(error: duckdb.Error) -> CacheError:
    return CacheError(f"the query failed: {' '.join(str(error).partition(chr(10) * 2)[0].split())}")
