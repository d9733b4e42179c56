"""The index: a DuckDB file derived from plans and manifests, which can be deleted and rebuilt at any time."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from ..schemas.cache_info import CACHE_INFO, CacheInfo, ProductInfo
from ..schemas.digest import digest_of
from ..schemas.errors import StorageError
from ..schemas.shard import CLIPS, ShardManifest
from ..schemas.tables import CLIP_SCHEMA, PLAN_SCHEMA, VIDEO_SCHEMA
from .manifests import MANIFESTS, read_manifests
from .plan_file import PLAN_FOLDER, Plan, plans_of
from .storage import Folder, storage_errors

INDEX = "index.duckdb"
FILE_SCHEMA = pa.schema(
    [
        pa.field("product", pa.string()),
        pa.field("shard_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("num_rows", pa.int64()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.string()),
        pa.field("product", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("num_clips", pa.int64()),
        pa.field("num_failures", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("host", pa.string()),
        pa.field("decode_s", pa.float64()),
        pa.field("tokenize_s", pa.float64()),
        pa.field("write_s", pa.float64()),
    ]
)
FAILURE_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("clip_id", "shard_id", "product", "step", "reason")]
)
PRODUCT_SCHEMA = pa.schema(
    [
        pa.field("product", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("tokenizer", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("codebook_size", pa.int64()),
        pa.field("dtype", pa.string()),
        pa.field("shape", pa.list_(pa.int32())),
    ]
)


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


def index_path(folder: Folder) -> str:
    """Where the index of a cache lives: inside a local cache that can be written, else beside other user caches."""
    if folder.is_local and os.access(folder.root, os.W_OK):
        return folder.path(INDEX)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return os.path.join(base, "tokenmill", "index", f"{digest_of(folder.url)[:16]}.duckdb")


def state_of(folder: Folder) -> str:
    """A digest of what an index is derived from; an index with another one is stale."""
    names = [
        name for name in (*folder.list(PLAN_FOLDER), *folder.list(MANIFESTS)) if not name.endswith("stamps.parquet")
    ]
    return digest_of([names, folder.read(CACHE_INFO).decode()])


def ensure_index(folder: Folder) -> str:
    """The path of an index that is up to date, built now if it is not."""
    path, state = index_path(folder), state_of(folder)
    if not os.path.exists(path) or _state_in(path) != state:
        build_index(folder)
    return path


def _state_in(path: str) -> str | None:
    try:
        with duckdb.connect(path, read_only=True) as connection:
            row = connection.execute("select value from meta where key = 'state'").fetchone()
    except duckdb.Error:
        return None
    return row[0] if row else None


def build_index(folder: Folder) -> str:
    """Derive the index anew and put it in place by rename; readers of an older one keep it. Returns its path."""
    path = index_path(folder)
    with storage_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    state = state_of(folder)
    info = CacheInfo.from_json(folder.read(CACHE_INFO), folder.uri(CACHE_INFO))
    manifests = read_manifests(folder, {product: entry.fingerprint for product, entry in info.products.items()})
    with (
        storage_errors(path),
        tempfile.TemporaryDirectory(prefix=".index-", dir=os.path.dirname(path)) as aside,
    ):
        try:
            with connect(folder, f"{aside}/{INDEX}") as connection:
                _fill(connection, folder, info, manifests)
                connection.execute("create table meta as select 'state' as key, ? as value", [state])
        except duckdb.Error as error:
            reason = " ".join(str(error).partition("\n")[0].split())
            raise StorageError(
                f"{path}: the index could not be built ({reason}): tokenmill verify names what is absent or damaged"
            ) from error
        os.replace(f"{aside}/{INDEX}", path)
    return path


def _fill(
    connection: duckdb.DuckDBPyConnection, folder: Folder, info: CacheInfo, manifests: Sequence[ShardManifest]
) -> None:
    _insert(
        connection,
        "products",
        PRODUCT_SCHEMA,
        [_product_row(name, entry) for name, entry in info.products.items()],
    )
    _insert(connection, "files", FILE_SCHEMA, [row for manifest in manifests for row in _file_rows(manifest)])
    _insert(connection, "shards", SHARD_SCHEMA, [_shard_row(manifest) for manifest in manifests])
    failures = [
        {
            "clip_id": f.clip_id,
            "shard_id": m.shard_id,
            "product": m.product,
            "step": f.step,
            "reason": f.reason,
        }
        for m in manifests
        for f in m.failures
    ]
    _insert(connection, "failed_clips", FAILURE_SCHEMA, failures)
    _add_plans(connection, folder, plans_of(folder))
    _add_rows(connection, folder)


def _insert(connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, rows: list[dict]) -> None:
    connection.register("new_rows", pa.Table.from_pylist(rows, schema=schema))
    connection.execute(f"create table {name} as from new_rows")
    connection.unregister("new_rows")


def _add_plans(connection: duckdb.DuckDBPyConnection, folder: Folder, plans: Sequence[Plan]) -> None:
    """Videos as the best of what the plans say of them, and the failures of videos and clips in one table."""
    _create(connection, "planned_clips", [folder.uri(plan.name) for plan in plans], PLAN_SCHEMA)
    _create(connection, "all_videos", [folder.uri(plan.videos_name) for plan in plans], VIDEO_SCHEMA)
    connection.execute("""
        create table videos as
        select * exclude (metadata), metadata::json as metadata from all_videos v
        where status <> 'duplicate'
          and not (status = 'failed' and exists (from all_videos w where w.uri = v.uri and w.status <> 'failed'))
        qualify row_number() over (partition by video_id order by status = 'planned' desc, uri) = 1;
        create table duplicates as
        select video_id, uri, caption, metadata::json as metadata, reason from all_videos
        where status = 'duplicate' qualify row_number() over (partition by uri order by video_id) = 1;
        create table plan_shards as select shard_id, count(*) as num_clips from planned_clips group by shard_id;
        create table failures as
        select f.clip_id, p.video_id, p.uri, f.shard_id, f.product, f.step, f.reason
        from failed_clips f left join planned_clips p using (clip_id)
        union all by name
        select video_id, uri, 'probe' as step, reason from videos where status = 'failed';
        drop table all_videos;
        drop table failed_clips;
        drop table planned_clips;
    """)


def _add_rows(connection: duckdb.DuckDBPyConnection, folder: Folder) -> None:
    """The clips themselves, and where the tokens of each clip lie: file and row, ordered by clip."""
    _create(connection, "clips", file_uris(connection, folder, CLIPS), CLIP_SCHEMA, order_by="clip_id")
    connection.execute("create table locations (product varchar, clip_id uuid, name varchar, row_in_file bigint)")
    for (product,) in connection.execute("select product from products where product <> ?", [CLIPS]).fetchall():
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
    connection: duckdb.DuckDBPyConnection, name: str, paths: list[str], schema: pa.Schema, order_by: str = ""
) -> None:
    """A table of all rows in these Parquet files, or an empty one of the same columns."""
    if paths:
        order = f"order by {order_by}" if order_by else ""
        connection.execute(f"create table {name} as from read_parquet(?) {order}", [paths])
    else:
        _insert(connection, name, schema, [])


def _product_row(name: str, entry: ProductInfo) -> dict:
    tokenizer = entry.tokenizer or {}
    return {
        "product": name,
        "fingerprint": entry.fingerprint,
        "tokenizer": tokenizer.get("name"),
        "kind": tokenizer.get("kind"),
        "codebook_size": tokenizer.get("codebook_size"),
        "dtype": tokenizer.get("dtype"),
        "shape": list(entry.shape),
    }


def _file_rows(manifest: ShardManifest) -> list[dict]:
    return [
        {
            "product": manifest.product,
            "shard_id": manifest.shard_id,
            "name": file.name,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "num_rows": file.num_rows,
        }
        for file in manifest.files
    ]


def _shard_row(manifest: ShardManifest) -> dict:
    return {
        "shard_id": manifest.shard_id,
        "product": manifest.product,
        "fingerprint": manifest.fingerprint,
        "num_clips": manifest.num_rows,
        "num_failures": len(manifest.failures),
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "host": manifest.host,
        **{f"{step}_s": manifest.timings_s.get(step) for step in ("decode", "tokenize", "write")},
    }
