"""The tables of an index: what they are, and how rows of new manifests and plans come into them.

`clips` and the places of every product's clips are in runs by clip id, one for each time that rows were added: DuckDB
keeps the least and greatest value of every part of a column, so that a clip is found without reading all of them.
Places name a file by its number, the view `locations` by its name.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import duckdb
import pyarrow as pa

from ..schemas.cache_info import CacheInfo
from ..schemas.clip import ClipFailure
from ..schemas.shard import CLIPS, FileEntry, ShardManifest, holds_values
from ..schemas.tables import PLAN_SCHEMA, VIDEO_SCHEMA
from .account import accounts_of
from .byte_ranges import opened
from .index_clips import CLIPS_VIEW, STORED_CLIP_SCHEMA, STORED_CLIPS, STORED_OF_FILES
from .index_rows import (
    FAILURE_SCHEMA,
    FILE_NUMBER,
    FILE_SCHEMA,
    INDEXED_PLAN_SCHEMA,
    MANIFEST_SCHEMA,
    META_SCHEMA,
    PLAN_SHARD_SCHEMA,
    PRODUCT_SCHEMA,
    ROW_GROUP_SCHEMA,
    RUN_SCHEMA,
    SHARD_SCHEMA,
    failed_rows,
    failure_rows,
    file_rows,
    plan_rows,
    product_row,
    shard_row,
)
from .index_source import IndexSource, content_of
from .manifests import READ_THREADS
from .plan_file import Plan
from .row_groups import read_row_groups
from .storage import Folder

PLACES = "places of "  # begins the name of the table of a product's clips
FILES_AT_ONCE = 10_000  # whose row groups are held in memory
VIDEO_OF_CLIP = [PLAN_SCHEMA.field("video_id").with_nullable(True), PLAN_SCHEMA.field("uri").with_nullable(True)]
TABLES = {
    "meta": META_SCHEMA,
    "indexed_plans": INDEXED_PLAN_SCHEMA,
    "indexed_manifests": MANIFEST_SCHEMA,
    "runs": RUN_SCHEMA,
    "plan_shards": PLAN_SHARD_SCHEMA,
    "numbered_files": pa.schema([*FILE_SCHEMA, FILE_NUMBER]),
    "shards": SHARD_SCHEMA,
    "failures_of_shards": pa.schema([*FAILURE_SCHEMA, *VIDEO_OF_CLIP]),
    "row_groups": ROW_GROUP_SCHEMA,
    STORED_CLIPS: STORED_CLIP_SCHEMA,
}


def create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """The tables that rows are added to, without any."""
    for name, schema in TABLES.items():
        replace_table(connection, name, schema, [])
    create_views(connection)


def create_views(connection: duckdb.DuckDBPyConnection) -> None:
    """The views `files` and `clips`."""
    connection.execute("create view files as select * exclude (file) from numbered_files")
    connection.execute(CLIPS_VIEW)


def replace_table(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, rows: list[dict]) -> None:
    """A table of these rows alone."""
    connection.register("new_rows", pa.Table.from_pylist(rows, schema=schema))
    connection.execute(f"create or replace table {quoted(name)} as from new_rows")
    connection.unregister("new_rows")


def add(connection: duckdb.DuckDBPyConnection, name: str, rows: list[dict]) -> None:
    """Add rows to a table of TABLES."""
    if rows:
        connection.register("new_rows", pa.Table.from_pylist(rows, schema=TABLES[name]))
        connection.execute(f"insert into {name} by name from new_rows")
        connection.unregister("new_rows")


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def part_of(product: str) -> str | None:
    """The table of the rows of a product's clips; None where there is none."""
    return STORED_CLIPS if product == CLIPS else f"{PLACES}{product}" if "/" in product else None


def remove_product(connection: duckdb.DuckDBPyConnection, product: str) -> None:
    """Remove all rows of a product other than clips."""
    connection.execute("delete from row_groups where name in (select name from files where product = ?)", [product])
    for table in ("numbered_files", "shards", "failures_of_shards", "indexed_manifests"):
        connection.execute(f"delete from {table} where product = ?", [product])
    if part := part_of(product):
        connection.execute("delete from runs where part = ?", [part])
        connection.execute(f"drop table if exists {quoted(part)}")


def add_manifests(connection: duckdb.DuckDBPyConnection, source: IndexSource, names: Sequence[str]) -> None:
    """Add what the manifests called `names` say, and what lies in their files."""
    first = _next_file(connection)
    for manifests in source.read(names):
        add(connection, "indexed_manifests", [_indexed_manifest(source, manifest) for manifest in manifests])
        files = [row for manifest in manifests for row in file_rows(manifest)]
        numbers = range(_next_file(connection), _next_file(connection) + len(files))
        add(connection, "numbered_files", [row | {"file": i} for row, i in zip(files, numbers, strict=True)])
        add(connection, "shards", [shard_row(manifest) for manifest in manifests])
        _add_failures(connection, source, [row for manifest in manifests for row in failure_rows(manifest)])
        _add_row_groups(connection, source.folder, [row["name"] for row in files if holds_values(row["product"])])
    for (product,) in connection.execute("select distinct product from numbered_files order by 1").fetchall():
        _add_part(connection, source.folder, product, first)


def _indexed_manifest(source: IndexSource, manifest: ShardManifest) -> dict:
    """A manifest that an index holds (MANIFEST_SCHEMA)."""
    stamp = dict(zip(source.stamp_columns, source.stamps[manifest.name], strict=True))
    return {"name": manifest.name, "product": manifest.product, "content": content_of(manifest), **stamp}


def _next_file(connection: duckdb.DuckDBPyConnection) -> int:
    return connection.execute("select coalesce(max(file) + 1, 0) from numbered_files").fetchall()[0][0]


def _add_failures(connection: duckdb.DuckDBPyConnection, source: IndexSource, rows: list[dict]) -> None:
    """Failures with the videos of their clips, as the plan has them that is no retry."""
    if not rows:
        return
    uris = [source.folder.uri(plan.name) for plan in source.plans if not plan.is_retry]
    shards = sorted({row["shard_id"] for row in rows})  # by which row groups of the plan are passed over
    connection.register("failed", pa.Table.from_pylist(rows, schema=FAILURE_SCHEMA))
    connection.execute(
        f"""insert into failures_of_shards by name
            select f.*, p.video_id, p.uri from failed f left join (
                select clip_id, video_id, uri from read_parquet(?)
                where shard_id in ({", ".join("?" for _ in shards)})) p using (clip_id)""",
        [uris, *shards],
    )
    connection.unregister("failed")


def _add_row_groups(connection: duckdb.DuckDBPyConnection, folder: Folder, names: Sequence[str]) -> None:
    """Where tokens lie in every file called `names`, from the files' footers."""

    def rows_of(name: str) -> list[dict]:
        with opened(folder, name, read_row_groups) as groups:
            return [{"name": name, **asdict(group)} for group in groups]

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="footers") as pool:
        for first in range(0, len(names), FILES_AT_ONCE):
            found = pool.map(rows_of, names[first : first + FILES_AT_ONCE])
            add(connection, "row_groups", [row for rows in found for row in rows])


def _add_part(connection: duckdb.DuckDBPyConnection, folder: Folder, product: str, first: int) -> None:
    """A run of the clips in those files of a product that are numbered from `first` on."""
    part = part_of(product)
    names = connection.execute(
        "select name from numbered_files where product = ? and file >= ? order by file", [product, first]
    ).fetchall()
    if part is None or not names:
        return
    uris = [folder.uri(name) for (name,) in names]
    if product == CLIPS:
        (added,) = connection.execute(f"insert into {part} by name {STORED_OF_FILES}", [uris]).fetchall()
    else:
        table = "clip_id uuid, file uinteger, row_in_file uinteger"
        connection.execute(f"create table if not exists {quoted(part)} ({table})")
        (added,) = connection.execute(
            f"""insert into {quoted(part)}
                select clip_id::uuid, file, file_row_number
                from read_parquet(?, filename = 'uri', file_row_number = true) r
                join numbered_files f on f.product = ? and f.name = substr(r.uri, ?) order by 1""",
            [uris, product, len(folder.uri("")) + 1],
        ).fetchall()
    add(connection, "runs", [{"part": part, "num_rows": added[0]}])


def create_locations(connection: duckdb.DuckDBPyConnection) -> None:
    """The view `locations`: file and row of every clip of every product."""
    tables = "select table_name from duckdb_tables() where database_name = current_database() and table_name ^@ ?"
    selected = ["select ''::varchar as product, null::uuid as clip_id, ''::varchar as name, 0::bigint as row_in_file"]
    selected[0] += " where false"
    for (part,) in connection.execute(f"{tables} order by 1", [PLACES]).fetchall():
        product = part.removeprefix(PLACES).replace("'", "''")
        selected.append(
            f"select '{product}', p.clip_id, f.name, p.row_in_file::bigint"
            f" from {quoted(part)} p join numbered_files f using (file)"
        )
    connection.execute(f"create or replace view locations as {' union all '.join(selected)}")


def add_plans(
    connection: duckdb.DuckDBPyConnection, folder: Folder, plans: Sequence[Plan], new: Sequence[Plan]
) -> None:
    """Add the shards of `new` plans, and videos as the best of what all plans say of them."""
    add(connection, "plan_shards", [row for plan in new for row in plan_rows(plan)])
    add(connection, "indexed_plans", [indexed_plan(plan) for plan in new])
    numbers = {folder.uri(plan.videos_name): plan.record.number for plan in plans}
    planned = pa.schema([pa.field("filename", pa.string()), pa.field("plan", pa.int64())])
    replace_table(
        connection, "plan_files", planned, [{"filename": uri, "plan": number} for uri, number in numbers.items()]
    )
    if numbers:
        connection.execute("create table all_videos as from read_parquet(?, filename = true)", [list(numbers)])
    else:
        replace_table(connection, "all_videos", pa.schema([*VIDEO_SCHEMA, planned.field("filename")]), [])
    connection.execute("""
        create or replace table videos as
        select * exclude (metadata, filename, plan, last_plan), metadata::json as metadata
        from (select *, max(plan) over (partition by uri) as last_plan from all_videos join plan_files using (filename))
        where status <> 'duplicate' and (status not in ('failed', 'quarantined') or plan = last_plan)
        qualify row_number() over (partition by video_id order by status = 'planned' desc, plan desc, uri) = 1;
        create or replace table duplicates as
        select video_id, uri, caption, metadata::json as metadata, reason from all_videos
        where status = 'duplicate' qualify row_number() over (partition by uri order by video_id) = 1;
        drop table all_videos;
        drop table plan_files""")


def indexed_plan(plan: Plan) -> dict:
    """A plan that an index holds (INDEXED_PLAN_SCHEMA)."""
    return {"name": plan.record.name, "clips": plan.name, "videos": plan.videos_name}


def replace_failures(connection: duckdb.DuckDBPyConnection, plans: Sequence[Plan], info: CacheInfo) -> None:
    """The failures of videos and, in their latest attempt, of clips.

    A video that could not be read is a failure until a later plan says more of the same uri.
    """
    accounts = accounts_of(plans, _committed(connection), info.fingerprints) if _any_failed(connection) else []
    rows = [row for account in accounts for row in failed_rows(account)]
    replace_table(connection, "failed_clips", FAILURE_SCHEMA, rows)
    connection.execute("""
        create or replace table failures as
        select f.clip_id, v.video_id, v.uri, f.shard_id, f.product, f.status, f.step, f.reason, f.attempts, f.log_tail
        from failed_clips f left join (
            select clip_id, any_value(video_id) as video_id, any_value(uri) as uri from failures_of_shards group by all
        ) v using (clip_id)
        union all by name
        select video_id, uri, status, 'probe' as step, reason, attempts, log_tail from videos
        where status in ('failed', 'quarantined');
        drop table failed_clips""")


def _any_failed(connection: duckdb.DuckDBPyConnection) -> bool:
    return bool(connection.execute("select 1 from failures_of_shards limit 1").fetchall())


def _committed(connection: duckdb.DuckDBPyConnection) -> list[ShardManifest]:
    """All manifests of the index, as far as accounts need them."""
    failures: dict[tuple[str, str], list[ClipFailure]] = {}
    for row in connection.sql("select * exclude (video_id, uri) from failures_of_shards").to_arrow_table().to_pylist():
        place = row.pop("shard_id"), row.pop("product")
        failures.setdefault(place, []).append(ClipFailure(**row))
    shards = connection.execute("select shard_id, product, fingerprint, num_clips from shards").fetchall()
    return [
        ShardManifest(
            shard_id=shard_id,
            product=product,
            fingerprint=fingerprint,
            files=(FileEntry(name="", size_bytes=0, sha256="", num_rows=num_clips),),
            failures=tuple(failures.get((shard_id, product), ())),
            clips_per_video={},
            host="",
            timings_s={},
        )
        for shard_id, product, fingerprint, num_clips in shards
    ]


def replace_products(connection: duckdb.DuckDBPyConnection, info: CacheInfo) -> None:
    """The products as they are now."""
    replace_table(
        connection, "products", PRODUCT_SCHEMA, [product_row(name, one) for name, one in info.products.items()]
    )
