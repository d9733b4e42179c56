"""The index: a DuckDB file derived from plans and manifests, which can be deleted and rebuilt at any time.

Every snapshot has one of its own beside that of what is committed now.
"""

import contextlib
import glob
import os

import duckdb

from ..schemas.digest import digest_of
from ..schemas.errors import CacheError
from ..schemas.snapshot import Snapshot
from .index_source import IndexSource
from .index_update import INDEX, INDEX_REVISION, attach, connect, make_index
from .places import user_cache_folder
from .storage import Folder, storage_errors

PUBLISHED_OVER = 5  # times that other builders may put an index of an earlier state in place of one just made


def index_path(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """Where an index of a cache lives: inside a local cache that can be written, else beside other user caches."""
    suffix = f"-{snapshot.number}.duckdb" if snapshot else ".duckdb"
    if folder.is_local and os.access(folder.root, os.W_OK):
        return folder.path(f"{INDEX}{suffix}")
    return os.path.join(user_cache_folder("index"), f"{digest_of(folder.url)[:16]}{suffix}")


def ensure_index(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """The path of an index that is up to date, made now if it is not."""
    open_index(folder, snapshot).close()
    return index_path(folder, snapshot)


def open_index(folder: Folder, snapshot: Snapshot | None = None) -> duckdb.DuckDBPyConnection:
    """A connection that reads an index of what is committed now, or of what `snapshot` pins.

    One that is not up to date grows by what is new, if all that it is made from is there still, or is built anew. A
    new one of a snapshot may begin as that of what is committed now.
    """
    path = index_path(folder, snapshot)
    for _ in range(PUBLISHED_OVER):
        source = IndexSource(folder, snapshot, INDEX_REVISION)
        if connection := _attached(folder, path, source.digest):
            return connection
        make_index(path, source, starts=list(dict.fromkeys([path, index_path(folder)])))
        if connection := _attached(folder, path, source.digest):
            return connection
    raise CacheError(f"{path}: other processes keep putting older indexes in its place: run this again")


def _attached(folder: Folder, path: str, state: str) -> duckdb.DuckDBPyConnection | None:
    """A connection to the index at `path`; None where there is none of that state."""
    if not os.path.exists(path):
        return None
    connection = connect(folder)
    with contextlib.suppress(duckdb.Error):  # not an index, or of another revision
        attach(connection, path)
        if ("state", state) in connection.execute("select key, value from meta").fetchall():
            return connection
    connection.close()
    return None


def build_index(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """Make the index from nothing and put it in place; readers of an older one keep it. Returns its path."""
    path = index_path(folder, snapshot)
    make_index(path, IndexSource(folder, snapshot, INDEX_REVISION))
    return path


def remove_indexes(folder: Folder) -> None:
    """Remove the indexes of what is committed now and of all snapshots; readers keep those that they have open."""
    live, _ = os.path.splitext(index_path(folder))
    for path in (f"{live}.duckdb", *glob.glob(f"{glob.escape(live)}-*.duckdb")):
        with storage_errors(path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def file_uris(connection: duckdb.DuckDBPyConnection, folder: Folder, product: str) -> list[str]:
    """The files of a product's current version, as DuckDB can open them."""
    names = connection.execute("select name from files where product = ? order by name", [product]).fetchall()
    return [folder.uri(name) for (name,) in names]
