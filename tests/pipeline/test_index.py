"""The index says what plans and manifests say, of the latest attempt."""

import json
from pathlib import Path

from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.index import ensure_index, index_path
from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import write_plan
from tokenmill.pipeline.snapshots import take_snapshot
from tokenmill.pipeline.storage import Folder

from .test_cache import make_cache
from .test_plan import facts, recipe


def test_what_a_later_plan_says_of_a_video_counts(tmp_path: Path) -> None:
    make_cache(str(tmp_path))
    folder = Folder(str(tmp_path))
    failed = {"pts_s": None, "reason": "damaged"}
    first = [facts(f"/{name}.mp4", **failed) for name in "abc"]
    later = [
        facts("/a.mp4", video_id="a" * 64),
        facts("/b.mp4", video_id="b" * 64, pts_s=None, reason="killed", status="quarantined"),
    ]
    for number, found in ((2, first), (3, later)):
        assert write_plan(folder, make_plan(recipe(), found), number=number)
    cache = open_cache(str(tmp_path))
    rows = cache.sql("select uri, status, reason from videos where length(uri) = 6 order by uri").to_pylist()
    assert [(row["uri"], row["status"], row["reason"]) for row in rows] == [
        ("/a.mp4", "planned", None),
        ("/b.mp4", "quarantined", "killed"),
        ("/c.mp4", "failed", "damaged"),
    ]
    failures = cache.sql("select uri, status, step, attempts from failures order by uri").to_pylist()
    assert failures == [
        {"uri": "/b.mp4", "status": "quarantined", "step": "probe", "attempts": 1},
        {"uri": "/c.mp4", "status": "failed", "step": "probe", "attempts": 1},
    ]


def test_manifests_of_shards_in_no_plan_do_not_count(tmp_path: Path) -> None:
    _, clips = make_cache(str(tmp_path))
    before = open_cache(str(tmp_path)).sql("from files order by name")
    manifest = next((tmp_path / "manifests" / "tokens" / "dct").iterdir())
    stray = json.loads(manifest.read_text()) | {"shard_id": "0" * 16}
    manifest.with_name(manifest.name.replace(manifest.name[:16], "0" * 16)).write_text(json.dumps(stray))
    cache = open_cache(str(tmp_path))
    assert cache.sql("from files order by name") == before
    assert cache.sql("select count(*) as n from tokens_dct")["n"].to_pylist() == [len(clips)]


def test_an_index_is_rebuilt_when_a_manifest_was_made_again_with_other_content(tmp_path: Path) -> None:
    make_cache(str(tmp_path))
    assert open_cache(str(tmp_path)).sql("select count(*) as n from failures")["n"].to_pylist() == [0]
    manifest = next((tmp_path / "manifests" / "tokens" / "dct").iterdir())
    values = json.loads(manifest.read_text())
    values["failures"] = [
        {"clip_id": "0" * 32, "step": "decode", "reason": "x", "status": "quarantined", "attempts": 2, "log_tail": "y"}
    ]
    manifest.write_text(json.dumps(values))
    rows = open_cache(str(tmp_path)).sql("select product, status, attempts, log_tail from failures").to_pylist()
    assert rows == [{"product": "tokens/dct", "status": "quarantined", "attempts": 2, "log_tail": "y"}]


def test_indexes_of_snapshots_never_clash_with_the_live_one(tmp_path: Path) -> None:
    make_cache(str(tmp_path))
    folder = Folder(str(tmp_path))
    snapshot, _ = take_snapshot(folder)
    paths = [index_path(folder), index_path(folder, snapshot)]
    remote = Folder("memory:///indexed")
    paths += [index_path(remote), index_path(remote, snapshot)]
    assert len(set(paths)) == 4
    assert ensure_index(folder, snapshot) == f"{tmp_path}/index-1.duckdb"
    built = Path(paths[1]).stat().st_mtime_ns
    make_changed = write_plan(folder, make_plan(recipe(), [facts("/new.mp4")]), number=2)
    assert make_changed
    ensure_index(folder)
    assert ensure_index(folder, snapshot) == paths[1]
    assert Path(paths[1]).stat().st_mtime_ns == built
