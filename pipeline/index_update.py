"""Making an index: from nothing, or from one that holds a part of what is committed now.

Either way the file is written aside, in a folder that a killed builder leaves and a later one removes, and takes the
place of the old index at once: who reads that one keeps it, and of many builders each puts a right one in place.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ..schemas.errors import StorageError
from ..schemas.shard import CLIPS
from .index_clips import STORED_CLIPS
from .index_source import IndexSource, Stamp
from .index_tables import (
    PLACES,
    TABLES,
    add,
    add_manifests,
    add_plans,
    create_locations,
    create_tables,
    create_views,
    indexed_plan,
    quoted,
    remove_product,
    replace_failures,
    replace_products,
    replace_table,
)
from .storage import Folder, storage_errors

log = logging.getLogger(__name__)

INDEX = "index"
INDEX_REVISION = 7  # rises with every change of the tables: an index of another one is built anew
ROW_GROUP = 122_880  # rows that DuckDB reads to find one, at most, in a run by clip id
MOST_READ = 9 * ROW_GROUP  # to find one in all runs: then they are sorted into one
LEFT_AFTER_S = 24 * 3600.0  # a builder that has not written for so long was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an index is made from: its plans, stamps of manifests by name, and fingerprints of products."""

    plans: Sequence[dict[str, Any]]
    stamps: dict[str, Stamp]
    fingerprints: dict[str, str]


LATE_ROWS = 10_000  # a query for the first so many rows finds them before it reads their other columns; DuckDB has 50
NOTHING = Held(plans=(), stamps={}, fingerprints={})


def connect(folder: Folder, database: str = ":memory:") -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that never downloads extensions and reads the cache's own filesystem."""
    config: dict[str, Any] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",
        "late_materialization_max_rows": LATE_ROWS,
    }
    connection = duckdb.connect(database, config=config)
    if not folder.is_local:
        connection.register_filesystem(folder.fs)
    return connection


def attach(connection: duckdb.DuckDBPyConnection, path: str) -> None:
    """Make the index at `path` what queries are about."""
    connection.execute(f"attach '{path.replace(chr(39), chr(39) * 2)}' as idx (read_only); use idx")


def make_index(path: str, source: IndexSource, starts: Sequence[str] = ()) -> None:
    """Put an index of `source` at `path`, made from the first of the indexes `starts` that can be, or from nothing.

    StorageError says what could not be read.
    """
    folder = os.path.dirname(path)
    with storage_errors(path):
        os.makedirs(folder, exist_ok=True)
        _remove_left(folder)
        with tempfile.TemporaryDirectory(prefix=f".{INDEX}-", dir=folder) as aside:
            made = next((made for start in starts if (made := _grown(source, start, aside))), None)
            os.replace(made or _built(path, source, aside), path)


def _remove_left(folder: str) -> None:
    for place in Path(folder).glob(f".{INDEX}-*"):
        with contextlib.suppress(OSError):  # another builder has just removed it
            written_s = max(file.stat().st_mtime for file in (place, *place.iterdir()))
            if written_s < time.time() - LEFT_AFTER_S:
                shutil.rmtree(place, ignore_errors=True)


def _built(path: str, source: IndexSource, aside: str) -> str:
    made = f"{aside}/{INDEX}"
    try:
        with connect(source.folder, made) as connection:
            create_tables(connection)
            _fill(connection, source, NOTHING)
    except duckdb.Error as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise StorageError(
            f"{path}: the index could not be built ({reason}): tokenmill verify names what is absent or damaged"
        ) from error
    return made


def _grown(source: IndexSource, start: str, aside: str) -> str | None:
    """An index made from a copy of the one at `start`; None where that does not hold a part of `source`."""
    copy, sorted_anew = f"{aside}/grown", f"{aside}/sorted"
    if not os.path.exists(start):
        return None
    try:
        with connect(source.folder) as connection:
            attach(connection, start)
            if not _part_held(connection, source):
                return None
        shutil.copyfile(start, copy)
        with connect(source.folder, copy) as connection:
            held = _part_held(connection, source)  # another builder may have put a later one there
            if held is None:
                return None
            _fill(connection, source, held)
            if not _is_scattered(connection):
                return copy
        _sort_anew(copy, sorted_anew)
    except duckdb.Error as error:
        log.warning("event=index_not_grown index=%s reason=%r", start, str(error))
        return None
    return sorted_anew


def _part_held(connection: duckdb.DuckDBPyConnection, source: IndexSource) -> Held | None:
    """What an index holds; None where that is no part of `source`, or the index is of another revision.

    All plans and manifests that it is made from must be there still, and the clips be of its version.
    """
    if not connection.execute("select 1 from duckdb_tables() where table_name = 'meta'").fetchall():
        return None
    if ("revision", str(INDEX_REVISION)) not in connection.execute("select key, value from meta").fetchall():
        return None
    stamps = f"select name, {', '.join(source.stamp_columns)} from indexed_manifests"
    held = Held(
        plans=connection.sql("from indexed_plans").to_arrow_table().to_pylist(),
        stamps={name: tuple(stamp) for name, *stamp in connection.execute(stamps).fetchall()},
        fingerprints=dict(connection.execute("select product, fingerprint from products").fetchall()),
    )
    plans = [indexed_plan(plan) for plan in source.plans]
    is_part = (
        held.fingerprints.get(CLIPS) == source.info.fingerprints.get(CLIPS)
        and all(plan in plans for plan in held.plans)
        and all(source.stamps.get(name) == stamp for name, stamp in held.stamps.items())
    )
    return held if is_part else None


def _fill(connection: duckdb.DuckDBPyConnection, source: IndexSource, held: Held) -> None:
    """Make the tables those of `source`: they are of what is `held`."""
    fingerprints = source.info.fingerprints
    for product in [name for name, version in held.fingerprints.items() if fingerprints.get(name) != version]:
        remove_product(connection, product)
    known = [plan["name"] for plan in held.plans]
    new = [plan for plan in source.plans if plan.record.name not in known]
    if new or held is NOTHING:
        add_plans(connection, source.folder, source.plans, new)
    planned = {shard_id for (shard_id,) in connection.execute("select shard_id from plan_shards").fetchall()}
    add_manifests(connection, source, [name for name in source.wanted(planned) if name not in held.stamps])
    create_locations(connection)
    replace_products(connection, source.info)
    replace_failures(connection, source.plans, source.info)
    replace_table(connection, "meta", TABLES["meta"], [])
    meta = {"state": source.digest, "revision": str(INDEX_REVISION)}
    add(connection, "meta", [{"key": key, "value": value} for key, value in meta.items()])


def _is_scattered(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether a clip is to be looked for in many places, or a quarter of the file is empty."""
    connection.execute("checkpoint")
    runs = "select part, sum(least(num_rows, ?)) as num_read from runs group by part having num_read > ?"
    sizes = "select 1 from pragma_database_size() where free_blocks > total_blocks / 4 and total_blocks > 100"
    return bool(connection.execute(runs, [ROW_GROUP, MOST_READ]).fetchall() or connection.execute(sizes).fetchall())


def _sort_anew(path: str, target: str) -> None:
    """The index at `path` as a file of its own, with all runs sorted into one."""
    with duckdb.connect(target) as connection:
        connection.execute(f"attach '{path.replace(chr(39), chr(39) * 2)}' as old (read_only)")
        tables = "select table_name from duckdb_tables() where database_name = 'old' order by 1"
        for (name,) in connection.execute(tables).fetchall():
            order = "order by clip_id" if name == STORED_CLIPS or name.startswith(PLACES) else ""
            connection.execute(f"create table {quoted(name)} as from old.{quoted(name)} {order}")
        connection.execute(
            "create or replace table runs as select part, sum(num_rows)::bigint as num_rows from runs group by 1"
        )
        connection.execute("detach old")
        create_views(connection)
        create_locations(connection)
