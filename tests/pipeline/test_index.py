"""The index says what plans and manifests say, of the latest attempt."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.cache_head import read_info, register_products
from tokenmill.pipeline.index import build_index, ensure_index, index_path, open_index, remove_indexes
from tokenmill.pipeline.index_clips import CLIPS_VIEW, STORED_CLIPS, STORED_OF_FILES
from tokenmill.pipeline.index_source import IndexSource
from tokenmill.pipeline.index_update import INDEX_REVISION, make_index
from tokenmill.pipeline.plan import PlanTables, make_plan
from tokenmill.pipeline.plan_file import plans_of, read_table, write_plan
from tokenmill.pipeline.snapshots import take_snapshot
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.clip import ClipFailure
from tokenmill.schemas.shard import ShardManifest
from tokenmill.schemas.tables import CLIP_SCHEMA, STAMP_SCHEMA

from .test_cache import make_cache
from .test_plan import facts, recipe

TABLES = (
    "videos", "duplicates", "clips", "products", "shards", "files", "failures", "locations", "plan_shards",
    "row_groups",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of five products that has no index yet."""
    path = tmp_path_factory.mktemp("caches") / "whole"
    make_cache(str(path))
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all manifests that are read for indexes."""
    names: list[str] = []
    read = IndexSource.read
    monkeypatch.setattr(IndexSource, "read", lambda source, asked: (names.extend(asked), read(source, asked))[1])
    return names


def rows_in(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    """All rows of every table that users see, sorted."""
    with connection:
        return {name: sorted(map(repr, connection.execute(f"from {name}").fetchall())) for name in TABLES}


def rows_of(cache: Path) -> dict[str, list[str]]:
    return rows_in(open_index(Folder(str(cache))))


def rows_from_nothing(cache: Path) -> dict[str, list[str]]:
    build_index(Folder(str(cache)))
    return rows_of(cache)


def manifests_of(cache: Path, product: str) -> list[Path]:
    return sorted((cache / "manifests" / product).iterdir())


@contextlib.contextmanager
def without(*paths: Path) -> Iterator[None]:
    """The files at `paths` are not there yet: they come at the end."""
    held = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    yield
    for path, data in held.items():
        path.write_bytes(data)


def test_what_a_later_plan_says_of_a_video_counts(cache: Path) -> None:
    folder = Folder(str(cache))
    failed = {"pts_s": None, "reason": "damaged"}
    first = [facts(f"/{name}.mp4", **failed) for name in "abc"]
    later = [
        facts("/a.mp4", video_id="a" * 64),
        facts("/b.mp4", video_id="b" * 64, pts_s=None, reason="killed", status="quarantined"),
    ]
    for number, found in ((2, first), (3, later)):
        assert write_plan(folder, make_plan(recipe(), found), number=number)
    opened = open_cache(str(cache))
    rows = opened.sql("select uri, status, reason from videos where length(uri) = 6 order by uri").to_pylist()
    assert [(row["uri"], row["status"], row["reason"]) for row in rows] == [
        ("/a.mp4", "planned", None),
        ("/b.mp4", "quarantined", "killed"),
        ("/c.mp4", "failed", "damaged"),
    ]
    failures = opened.sql("select uri, status, step, attempts from failures order by uri").to_pylist()
    assert failures == [
        {"uri": "/b.mp4", "status": "quarantined", "step": "probe", "attempts": 1},
        {"uri": "/c.mp4", "status": "failed", "step": "probe", "attempts": 1},
    ]


def test_manifests_of_shards_in_no_plan_do_not_count(cache: Path) -> None:
    before = rows_of(cache)
    manifest = next((cache / "manifests" / "tokens" / "dct").iterdir())
    stray = json.loads(manifest.read_text()) | {"shard_id": "0" * 16}
    manifest.with_name(manifest.name.replace(manifest.name[:16], "0" * 16)).write_text(json.dumps(stray))
    assert rows_of(cache) == before == rows_from_nothing(cache)


def test_an_index_is_rebuilt_when_a_manifest_was_made_again_with_other_content(cache: Path) -> None:
    assert open_cache(str(cache)).sql("select count(*) as n from failures")["n"].to_pylist() == [0]
    manifest = next((cache / "manifests" / "tokens" / "dct").iterdir())
    values = json.loads(manifest.read_text())
    values["failures"] = [
        {"clip_id": "0" * 32, "step": "decode", "reason": "x", "status": "quarantined", "attempts": 2, "log_tail": "y"}
    ]
    manifest.write_text(json.dumps(values))
    rows = open_cache(str(cache)).sql("select product, status, attempts, log_tail from failures").to_pylist()
    assert rows == [{"product": "tokens/dct", "status": "quarantined", "attempts": 2, "log_tail": "y"}]


def test_indexes_of_snapshots_never_clash_with_the_live_one(cache: Path) -> None:
    folder = Folder(str(cache))
    snapshot, _ = take_snapshot(folder)
    paths = [index_path(folder), index_path(folder, snapshot)]
    remote = Folder("memory:///indexed")
    paths += [index_path(remote), index_path(remote, snapshot)]
    assert len(set(paths)) == 4
    assert ensure_index(folder, snapshot) == f"{cache}/index-1.duckdb"
    built = Path(paths[1]).stat().st_mtime_ns
    make_changed = write_plan(folder, make_plan(recipe(), [facts("/new.mp4")]), number=2)
    assert make_changed
    ensure_index(folder)
    assert ensure_index(folder, snapshot) == paths[1]
    assert Path(paths[1]).stat().st_mtime_ns == built


def test_an_index_grows_by_new_shards_alone(cache: Path, read_names: list[str]) -> None:
    new = [manifests_of(cache, product)[-1] for product in ("clips", "tokens/dct", "tokens/mean")]
    with without(*new):
        before = rows_of(cache)
    read_names.clear()
    grown = rows_of(cache)
    assert sorted(read_names) == sorted(str(path.relative_to(cache)) for path in new)
    assert len(grown["clips"]) > len(before["clips"])
    assert grown == rows_from_nothing(cache)


def test_an_index_grows_by_a_new_product(cache: Path, read_names: list[str]) -> None:
    new = manifests_of(cache, "tokens/levels")
    with without(*new, cache / "products" / "tokens" / "levels" / "1.json"):
        assert not any("tokens/levels" in row for row in rows_of(cache)["locations"])
    read_names.clear()
    grown = rows_of(cache)
    assert len(read_names) == len(new)
    assert grown == rows_from_nothing(cache)


def test_a_products_new_version_takes_the_place_of_the_old_one(cache: Path, read_names: list[str]) -> None:
    before, folder = rows_of(cache), Folder(str(cache))
    entry = read_info(folder).products["tokens/dct"]
    register_products(folder, {"tokens/dct": replace(entry, fingerprint="f" * 64)})
    for path in manifests_of(cache, "tokens/dct")[:2]:
        manifest = ShardManifest.from_json(path.read_bytes(), str(path))
        new = replace(manifest, fingerprint="f" * 64, host="elsewhere")
        assert folder.create(new.name, new.to_json())
    read_names.clear()
    grown = rows_of(cache)
    assert len(read_names) == 2
    assert len(grown["locations"]) < len(before["locations"])
    assert grown == rows_from_nothing(cache)


def test_a_manifest_made_again_makes_the_index_anew(cache: Path, read_names: list[str]) -> None:
    path = manifests_of(cache, "tokens/dct")[0]
    rows_of(cache)
    read_names.clear()
    manifest = ShardManifest.from_json(path.read_bytes(), str(path))
    path.unlink()
    rows_of(cache)
    failure = ClipFailure(clip_id="0" * 32, step="decode", reason="damaged")
    path.write_bytes(replace(manifest, failures=(failure,)).to_json())
    read_names.clear()
    grown = rows_of(cache)
    assert len(read_names) == 1
    path.write_bytes(replace(manifest, failures=(failure, failure)).to_json())
    read_names.clear()
    changed = rows_of(cache)
    assert len(read_names) == len(list((cache / "manifests").rglob("*.json")))
    assert (len(grown["failures"]), len(changed["failures"])) == (1, 1)
    assert changed == rows_from_nothing(cache)


def made_again(path: Path) -> None:
    """The manifest at `path`, deleted and made again: of as many bytes, by another host, a second later."""
    manifest = ShardManifest.from_json(path.read_bytes(), str(path))
    modified_ns, size_bytes = path.stat().st_mtime_ns, path.stat().st_size
    path.unlink()
    path.write_bytes(replace(manifest, host="x" * len(manifest.host)).to_json())
    os.utime(path, ns=(modified_ns, modified_ns + 10**9))
    assert path.stat().st_size == size_bytes


def hosts_in(connection: duckdb.DuckDBPyConnection) -> int:
    with connection:
        return connection.execute("select count(distinct host) from shards").fetchall()[0][0]


def test_a_manifest_made_again_of_the_same_size_makes_the_index_anew(cache: Path, read_names: list[str]) -> None:
    folder, path = Folder(str(cache)), manifests_of(cache, "tokens/dct")[0]
    assert hosts_in(open_index(folder)) == 1
    made_again(path)
    read_names.clear()
    assert hosts_in(open_index(folder)) == 2
    assert len(read_names) == len(list((cache / "manifests").rglob("*.json")))


def test_a_snapshots_index_does_not_begin_as_one_of_a_manifest_made_again(cache: Path) -> None:
    folder = Folder(str(cache))
    snapshot, _ = take_snapshot(folder)
    made_again(manifests_of(cache, "tokens/dct")[0])
    assert hosts_in(open_index(folder)) == 2
    assert hosts_in(open_index(folder, snapshot)) == 1


def test_an_index_stays_where_the_store_does_not_tell_when_files_were_modified(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, find = Folder(str(cache)), Folder.find
    monkeypatch.setattr(Folder, "find", lambda *asked: [replace(file, modified_s=time.time()) for file in find(*asked)])
    states = {IndexSource(folder, None, INDEX_REVISION).digest for _ in range(2)}
    assert len(states) == 1


def test_all_indexes_of_a_cache_are_removed_and_no_other_file(cache: Path) -> None:
    folder = Folder(str(cache))
    snapshot, _ = take_snapshot(folder)
    paths = [Path(ensure_index(folder)), Path(ensure_index(folder, snapshot))]
    (cache / "index.txt").touch()
    remove_indexes(folder)
    remove_indexes(folder)
    assert not any(path.exists() for path in paths)
    assert (cache / "index.txt").exists()


def test_failures_that_a_retry_mends_go_from_a_grown_index(cache: Path) -> None:
    folder = Folder(str(cache))
    (plan,) = plans_of(folder)
    rows = plan.rows_of([0]).slice(0, 2)
    ids, path = rows["clip_id"].to_pylist(), next((cache / "manifests" / "clips").glob(f"{plan.shards()[0][0]}-*"))
    manifest = ShardManifest.from_json(path.read_bytes(), str(path))
    failures = tuple(ClipFailure(clip_id=clip_id, step="decode", reason="damaged") for clip_id in ids)
    path.write_bytes(replace(manifest, failures=failures).to_json())
    assert len(rows_of(cache)["failures"]) == 2
    retried = rows.set_column(0, rows.schema.field("shard_id"), pa.array(["0" * 16] * 2))
    videos, stamps = read_table(folder, plan.videos_name), STAMP_SCHEMA.empty_table()
    retries = {"clips": manifest.fingerprint}
    assert write_plan(folder, PlanTables(clips=retried, videos=videos, stamps=stamps), number=2, retries=retries)
    assert len(rows_of(cache)["failures"]) == 2
    again = replace(manifest, shard_id="0" * 16, files=(), failures=failures[1:])
    assert folder.create(again.name, again.to_json())
    grown = rows_of(cache)
    with open_index(folder) as connection:
        found = connection.execute("select clip_id, shard_id, attempts, video_id, uri from failures").fetchall()
    assert found == [(ids[1], "0" * 16, 2, rows["video_id"][1].as_py(), rows["uri"][1].as_py())]
    assert grown == rows_from_nothing(cache)


def test_an_index_grows_by_a_new_plan(cache: Path, read_names: list[str]) -> None:
    rows_of(cache)
    folder = Folder(str(cache))
    assert write_plan(folder, make_plan(recipe(), [facts("/new.mp4"), facts("/bad.mp4", pts_s=None)]), number=2)
    read_names.clear()
    grown = rows_of(cache)
    assert read_names == []
    assert len(grown["failures"]) == 1
    assert grown == rows_from_nothing(cache)


def test_a_snapshots_index_begins_as_the_live_one(cache: Path, read_names: list[str]) -> None:
    folder, live = Folder(str(cache)), rows_of(cache)
    snapshot, _ = take_snapshot(folder)
    read_names.clear()
    assert rows_in(open_index(folder, snapshot)) == live
    assert read_names == []


def test_very_many_runs_are_sorted_into_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = [manifests_of(cache, product)[-i] for product in ("clips", "tokens/dct") for i in (1, 2)]
    with without(*new[1::2]):
        with without(*new[::2]):
            rows_of(cache)
        rows_of(cache)
    runs = "select count(*) from runs where part like '%clips' or part like '%dct'"
    folder = Folder(str(cache))
    with open_index(folder) as connection:
        assert connection.execute(runs).fetchall() == [(6,)]
        ids = [clip_id for (clip_id,) in connection.execute("select clip_id from clips").fetchall()]
    assert ids != sorted(ids)
    monkeypatch.setattr("tokenmill.pipeline.index_update.MOST_READ", 1)
    assert write_plan(folder, make_plan(recipe(), [facts("/new.mp4")]), number=2)
    with open_index(folder) as connection:
        assert connection.execute(runs).fetchall() == [(2,)]
        ids = [clip_id for (clip_id,) in connection.execute("select clip_id from clips").fetchall()]
        places = connection.execute("select clip_id from locations where product = 'tokens/dct'").fetchall()
    assert ids == sorted(ids)
    assert places == sorted(places)
    assert rows_of(cache) == rows_from_nothing(cache)


def test_readers_keep_the_index_that_they_opened(cache: Path) -> None:
    count = "select count(*) as n from locations"
    with without(manifests_of(cache, "tokens/dct")[0]):
        reader = open_cache(str(cache))
        reader.sql("select 1")
    with open_index(Folder(str(cache))) as connection:
        assert connection.execute(count).fetchall()[0][0] > reader.sql(count)["n"][0].as_py()


def test_builders_at_once_all_end_with_a_right_index(cache: Path) -> None:
    with without(manifests_of(cache, "clips")[0], manifests_of(cache, "tokens/dct")[0]):
        rows_of(cache)
    with ThreadPoolExecutor(3) as pool:
        several = list(pool.map(rows_of, [cache] * 3))
    expected = rows_from_nothing(cache)
    assert all(rows == expected for rows in several)
    assert not list(cache.glob(".index-*"))


def test_a_slow_builders_older_index_is_not_read(cache: Path) -> None:
    folder = Folder(str(cache))
    with without(manifests_of(cache, "clips")[0]):
        older = IndexSource(folder, None, INDEX_REVISION)
    expected = rows_of(cache)
    older.info  # noqa: B018
    make_index(index_path(folder), older)
    assert rows_of(cache) == expected


def test_a_killed_builder_leaves_nothing_in_the_way(cache: Path) -> None:
    code = (
        "import os, sys, signal; from tokenmill.pipeline.storage import Folder; from tokenmill.pipeline import index;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); index.build_index(Folder(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(cache)]).returncode == -signal.SIGKILL
    (left,) = cache.glob(".index-*")
    assert rows_of(cache) == rows_from_nothing(cache)
    assert left.exists()  # its builder may be at work
    for path in (*left.iterdir(), left):
        os.utime(path, (0, 0))
    build_index(Folder(str(cache)))
    assert not left.exists()


@pytest.mark.parametrize(
    "times_s",
    [
        [], [0.0], [k * 1001 / 30000 for k in range(1000, 1016)], [k / 15360 for k in (7, 519, 1031)],
        [k / 1000 for k in (33, 67, 100)], [-0.04, 0.0, 0.04], [0.1 + 0.2], [math.pi, math.e], [1e300, math.inf],
    ],
)  # fmt: skip
def test_times_of_frames_are_the_same_doubles(tmp_path: Path, times_s: list[float]) -> None:
    row = {"clip_id": "0" * 32, "video_id": "v", "start_s": 0.0, "end_s": 1.0, "num_valid": 1, "decoder": "d"}
    rows = [{**row, "frame_pts_s": times_s}]
    pq.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), tmp_path / "clips.parquet")
    with duckdb.connect() as connection:
        connection.execute(f"create table {STORED_CLIPS} as {STORED_OF_FILES}", [[str(tmp_path / "clips.parquet")]])
        connection.execute(CLIPS_VIEW)
        assert connection.execute("select frame_pts_s from clips").fetchall() == [(times_s,)]
