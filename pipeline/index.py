"""The index: a DuckDB file derived from plans and manifests, which can be deleted and rebuilt at any time.

Every snapshot has one of its own beside that of what is committed now.
"""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ..schemas.cache_info import CACHE_INFO, PRODUCTS
from ..schemas.digest import digest_of
from ..schemas.errors import StorageError
from ..schemas.shard import CLIPS, ShardManifest, holds_values
from ..schemas.snapshot import Snapshot
from ..schemas.tables import CLIP_SCHEMA, PLAN_SCHEMA, VIDEO_SCHEMA
from .account import accounts_of
from .byte_ranges import opened
from .index_rows import (
    FAILURE_SCHEMA,
    FILE_SCHEMA,
    PLAN_SHARD_SCHEMA,
    PRODUCT_SCHEMA,
    ROW_GROUP_SCHEMA,
    SHARD_SCHEMA,
    failed_rows,
    file_rows,
    plan_rows,
    product_row,
    shard_row,
)
from .manifests import MANIFESTS, READ_THREADS, is_manifest
from .plan_file import Plan, plan_names
from .row_groups import read_row_groups
from .snapshots import CacheState, state_at
from .storage import Folder, storage_errors

INDEX = "index"
INDEX_REVISION = 5  # rises with every change of the tables: an index of another one is built anew
FILENAME = pa.field("filename", pa.string())


def connect(folder: Folder, database: str = ":memory:") -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that never downloads extensions and reads the cache's own filesystem."""
    config: dict[str, Any] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",
    }
    connection = duckdb.connect(database, config=config)
    if not folder.is_local:
        connection.register_filesystem(folder.fs)
    return connection


def index_path(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """Where an index of a cache lives: inside a local cache that can be written, else beside other user caches."""
    suffix = f"-{snapshot.number}.duckdb" if snapshot else ".duckdb"
    if folder.is_local and os.access(folder.root, os.W_OK):
        return folder.path(f"{INDEX}{suffix}")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return os.path.join(base, "tokenmill", "index", f"{digest_of(folder.url)[:16]}{suffix}")


def state_of(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """A digest of what an index is derived from; an index with another one is stale."""
    if snapshot:
        return digest_of([INDEX_REVISION, snapshot.to_json().decode()])
    # A manifest never changes, but one that was deleted may be made again: with other failures its size is another.
    manifests = [(file.name, file.size_bytes) for file in folder.find(MANIFESTS) if is_manifest(file.name)]
    names = [*folder.list(PRODUCTS), *plan_names(folder)]
    return digest_of([INDEX_REVISION, names, manifests, folder.read(CACHE_INFO).decode()])


def ensure_index(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """The path of an index that is up to date, built now if it is not."""
    path, state = index_path(folder, snapshot), state_of(folder, snapshot)
    if not os.path.exists(path) or _state_in(path) != state:
        build_index(folder, snapshot)
    return path


def _state_in(path: str) -> str | None:
    try:
        with duckdb.connect(path, read_only=True) as connection:
            row = connection.execute("select value from meta where key = 'state'").fetchone()
    except duckdb.Error:
        return None
    return row[0] if row else None


def build_index(folder: Folder, snapshot: Snapshot | None = None) -> str:
    """Derive the index anew and put it in place by rename; readers of an older one keep it. Returns its path."""
    path = index_path(folder, snapshot)
    with storage_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    state_digest = state_of(folder, snapshot)
    state = state_at(folder, snapshot)
    with (
        storage_errors(path),
        tempfile.TemporaryDirectory(prefix=f".{INDEX}-", dir=os.path.dirname(path)) as aside,
    ):
        try:
            with connect(folder, f"{aside}/{INDEX}") as connection:
                _fill(connection, folder, state)
                connection.execute("create table meta as select 'state' as key, ? as value", [state_digest])
        except duckdb.Error as error:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise StorageError(
                f"{path}: the index could not be built ({reason}): tokenmill verify names what is absent or damaged"
            ) from error
        os.replace(f"{aside}/{INDEX}", path)
    return path


def _fill(connection: duckdb.DuckDBPyConnection, folder: Folder, state: CacheState) -> None:
    products = [product_row(name, entry) for name, entry in state.info.products.items()]
    _insert(connection, "products", PRODUCT_SCHEMA, products)
    _insert(connection, "files", FILE_SCHEMA, [row for manifest in state.manifests for row in file_rows(manifest)])
    _insert(connection, "shards", SHARD_SCHEMA, [shard_row(manifest) for manifest in state.manifests])
    accounts = accounts_of(state.plans, state.manifests, state.info.fingerprints)
    _insert(connection, "failed_clips", FAILURE_SCHEMA, [row for account in accounts for row in failed_rows(account)])
    _insert(connection, "plan_shards", PLAN_SHARD_SCHEMA, [row for plan in state.plans for row in plan_rows(plan)])
    _insert(connection, "row_groups", ROW_GROUP_SCHEMA, _row_groups(folder, state.manifests))
    _add_plans(connection, folder, state.plans)
    _add_rows(connection, folder)


def _row_groups(folder: Folder, manifests: Sequence[ShardManifest]) -> list[dict]:
    """Where tokens lie in every file that holds any (ROW_GROUP_SCHEMA), from the files' footers."""
    names = [file.name for manifest in manifests if holds_values(manifest.product) for file in manifest.files]

    def rows_of(name: str) -> list[dict]:
        with opened(folder, name, read_row_groups) as groups:
            return [{"name": name, **asdict(group)} for group in groups]

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="footers") as pool:
        return [row for rows in pool.map(rows_of, names) for row in rows]


def _insert(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, rows: list[dict]) -> None:
    connection.register("new_rows", pa.Table.from_pylist(rows, schema=schema))
    connection.execute(f"create table {name} as from new_rows")
    connection.unregister("new_rows")


def _add_plans(connection: duckdb.DuckDBPyConnection, folder: Folder, plans: Sequence[Plan]) -> None:
    """Videos as the best of what the plans say of them, and the failures of videos and clips in one table.

    A video that could not be read is a failure until a later plan says more of the same uri.
    """
    new = [folder.uri(plan.name) for plan in plans if not plan.is_retry]
    _create(connection, "planned_clips", new, PLAN_SCHEMA)
    numbers = {folder.uri(plan.videos_name): plan.record.number for plan in plans}
    _create(connection, "all_videos", list(numbers), pa.schema([*VIDEO_SCHEMA, FILENAME]), "filename = true")
    rows = [{"filename": name, "plan": number} for name, number in numbers.items()]
    _insert(connection, "plan_files", pa.schema([FILENAME, pa.field("plan", pa.int64())]), rows)
    connection.execute("""
        create table videos as
        select * exclude (metadata, filename, plan, last_plan), metadata::json as metadata
        from (select *, max(plan) over (partition by uri) as last_plan from all_videos join plan_files using (filename))
        where status <> 'duplicate' and (status not in ('failed', 'quarantined') or plan = last_plan)
        qualify row_number() over (partition by video_id order by status = 'planned' desc, plan desc, uri) = 1;
        create table duplicates as
        select video_id, uri, caption, metadata::json as metadata, reason from all_videos
        where status = 'duplicate' qualify row_number() over (partition by uri order by video_id) = 1;
        create table failures as
        select f.clip_id, p.video_id, p.uri, f.shard_id, f.product, f.status, f.step, f.reason, f.attempts, f.log_tail
        from failed_clips f left join planned_clips p using (clip_id)
        union all by name
        select video_id, uri, status, 'probe' as step, reason, attempts, log_tail from videos
        where status in ('failed', 'quarantined');
        drop table all_videos;
        drop table plan_files;
        drop table failed_clips;
        drop table planned_clips;
    """)


def _add_rows(connection: duckdb.DuckDBPyConnection, folder: Folder) -> None:
    """The clips themselves, and where the tokens of each clip lie: file and row, ordered by clip."""
    _create(connection, "clips", file_uris(connection, folder, CLIPS), CLIP_SCHEMA, then="order by clip_id")
    connection.execute("create table locations (product varchar, clip_id uuid, name varchar, row_in_file bigint)")
    for (product,) in connection.execute("select product from products where contains(product, '/')").fetchall():
        uris = file_uris(connection, folder, product)
        if uris:
            connection.execute(
                """insert into locations
                   select ?, clip_id::uuid, substr(uri, ?), file_row_number
                   from read_parquet(?, filename = 'uri', file_row_number = true) order by 2""",
                [product, len(folder.uri("")) + 1, uris],
            )


def file_uris(connection: duckdb.DuckDBPyConnection, folder: Folder, product: str) -> list[str]:
    """The files of a product's current version, as DuckDB can open them."""
    names = connection.execute("select name from files where product = ? order by name", [product]).fetchall()
    return [folder.uri(name) for (name,) in names]


def _create(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    paths: list[str],
    schema: pa.Schema,
    options: str = "",
    *,
    then: str = "",
) -> None:
    """A table of all rows in these Parquet files, or an empty one of the same columns."""
    if paths:
        connection.execute(f"create table {name} as from read_parquet(?{options and ', '}{options}) {then}", [paths])
    else:
        _insert(connection, name, schema, [])
