"""The plan: complete, deterministic, and balanced by cost."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import forget, plans_of, read_table, remember_stamps, unseen, write_plan
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.videos import Prober, VideoFacts, read_facts
from tokenmill.schemas.recipe import Recipe, parse_recipe
from tokenmill.schemas.tables import SOURCE_SCHEMA, STAMP_SCHEMA


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"cache": "c", "sources": ["v"], "tokens": {"fake": {"tokenizer": "fake"}}, **sections})


def facts(uri: str, num_frames: int = 40, **changes: Any) -> VideoFacts:
    values: dict[str, Any] = {
        "uri": uri,
        "stamp": "s1",
        "video_id": hashlib.sha256(uri.encode()).hexdigest(),
        "size_bytes": 1000,
        "caption": f"about {uri}",
        "metadata": '{"lang":"en"}',
        "pts_s": np.arange(num_frames) / 25,
        "is_regular": False,
        "end_s": num_frames / 25,
        "fps": 25.0,
        "width": 64,
        "height": 48,
        "codec": "h264",
        "reason": None,
    }
    return VideoFacts(**values | changes)


MANY = [facts(f"/videos/{i:03d}.mp4", num_frames=20 + i) for i in range(60)]


def probers(number: int) -> list[Prober]:
    return [Prober({}, timeout_s=60, memory_mb=4096) for _ in range(number)]


def listing(*rows: dict[str, Any]) -> pa.Table:
    defaults = dict.fromkeys(SOURCE_SCHEMA.names)
    return pa.Table.from_pylist([defaults | row for row in rows], schema=SOURCE_SCHEMA)


def test_every_clip_is_in_exactly_one_shard_and_shards_are_read_back_whole(tmp_path: Path) -> None:
    tables = make_plan(recipe(shards={"frames": 128}), MANY)
    folder = Folder(str(tmp_path))
    plan = write_plan(folder, tables)
    assert plan is not None
    shards = [plan.shard(i) for i in range(len(plan.shards()))]
    assert [(shard.shard_id, len(shard.clips)) for shard in shards] == plan.shards()
    clip_ids = [clip.clip_id for shard in shards for clip in shard.clips]
    assert clip_ids == tables.clips["clip_id"].to_pylist()
    assert len(set(clip_ids)) == len(clip_ids) == sum(-(-(20 + i) // 16) for i in range(60))
    clip = shards[0].clips[0]
    assert clip.video.uri.startswith("/videos/")
    assert clip.frame_pts_s == tuple(np.arange(clip.num_valid) / 25 + clip.start_s)


def test_the_same_videos_and_recipe_give_the_same_bytes(tmp_path: Path) -> None:
    for run in range(2):
        write_plan(Folder(str(tmp_path / str(run))), make_plan(recipe(), MANY))
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / str(run) / "plan").iterdir()} for run in (0, 1)
    )
    assert first == second
    assert len(first) == 3


def test_clip_ids_depend_on_content_and_sampling_and_not_on_the_uri() -> None:
    here = make_plan(recipe(), [facts("/a.mp4", video_id="x" * 64)]).clips["clip_id"].to_pylist()
    there = make_plan(recipe(), [facts("s3://b/a.mp4", video_id="x" * 64)]).clips["clip_id"].to_pylist()
    smaller = make_plan(recipe(clips={"height": 64}), [facts("/a.mp4", video_id="x" * 64)]).clips["clip_id"].to_pylist()
    assert here == there
    assert not set(here) & set(smaller)


def test_shards_are_balanced_by_cost_not_by_count() -> None:
    large = [facts(f"/l{i}.mp4", num_frames=160, width=1920, height=1080) for i in range(10)]
    small = [facts(f"/s{i}.mp4", num_frames=160, width=64, height=64) for i in range(10)]
    clips = make_plan(recipe(shards={"frames": 320}, clips={"height": 64, "width": 64}), large + small).clips
    pixels = {f.video_id: f.width * f.height for f in large + small if f.width and f.height}
    costs: dict[str, int] = {}
    for row in clips.select(["shard_id", "video_id"]).to_pylist():
        costs[row["shard_id"]] = costs.get(row["shard_id"], 0) + pixels[row["video_id"]]
    assert max(costs.values()) <= 1.5 * sum(costs.values()) / len(costs)


def test_a_shard_never_has_more_than_twice_the_frames_asked() -> None:
    dear = [facts("/0.mp4", num_frames=1600, width=7680, height=4320)]
    cheap = [facts(f"/{i}.mp4", num_frames=160, width=16, height=16) for i in range(1, 60)]
    clips = make_plan(recipe(shards={"frames": 160}, clips={"height": 16, "width": 16}), dear + cheap).clips
    _, counts = np.unique(clips["shard_id"].to_numpy(), return_counts=True)
    assert counts.max() <= 20
    assert counts.sum() == clips.num_rows


def test_captions_and_metadata_travel_and_unusable_videos_are_rows() -> None:
    same = facts("/b-copy.mp4", video_id=MANY[0].video_id)
    broken = facts("/broken.mp4", pts_s=None, reason="moov atom not found")
    short = facts("/short.mp4", num_frames=3)
    tables = make_plan(recipe(clips={"tail": "drop"}), [MANY[0], same, broken, short])
    rows = {row["uri"]: row for row in tables.videos.to_pylist()}
    assert {uri: row["status"] for uri, row in rows.items()} == {
        "/videos/000.mp4": "planned",
        "/b-copy.mp4": "duplicate",
        "/broken.mp4": "failed",
        "/short.mp4": "empty",
    }
    assert rows["/videos/000.mp4"]["caption"] == "about /videos/000.mp4"
    assert rows["/videos/000.mp4"]["metadata"] == '{"lang":"en"}'
    assert rows["/videos/000.mp4"]["num_dropped_frames"] == 4
    assert rows["/b-copy.mp4"]["reason"] == "same content as /videos/000.mp4"
    assert rows["/broken.mp4"]["reason"] == "moov atom not found"
    assert rows["/short.mp4"]["reason"].startswith("3 sampled frames, fewer than clips.num_frames=16")


def test_a_later_plan_holds_only_what_is_new() -> None:
    first = make_plan(recipe(), MANY[:2]).videos.to_pylist()
    known = {(row["video_id"], row["uri"]): row["status"] for row in first}
    copy = facts("/copy.mp4", video_id=MANY[0].video_id)
    later = make_plan(recipe(), [*MANY[:3], copy], known)
    assert {row["uri"]: row["status"] for row in later.videos.to_pylist()} == {
        MANY[2].uri: "planned",
        "/copy.mp4": "duplicate",
    }
    assert set(later.clips["uri"].to_pylist()) == {MANY[2].uri}


def test_a_video_that_could_not_be_read_is_planned_once_it_can() -> None:
    broken = facts("/a.mp4", pts_s=None, reason="permission denied")
    known = {(broken.video_id, broken.uri): "failed"}
    assert make_plan(recipe(), [broken], known).videos.num_rows == 0
    assert make_plan(recipe(), [facts("/a.mp4")], known).videos["status"].to_pylist() == ["planned"]


def test_poison_is_planned_as_quarantined_and_not_read_again(tmp_path: Path) -> None:
    poison = facts("/a.mp4", pts_s=None, reason="killed by SIGSEGV; 2 attempts", status="quarantined")
    failed = facts("/b.mp4", pts_s=None, reason="moov atom not found")
    tables = make_plan(recipe(), [poison, failed])
    assert tables.videos.sort_by("uri")["status"].to_pylist() == ["quarantined", "failed"]
    assert tables.stamps["uri"].to_pylist() == ["/a.mp4"]
    rows = [{"uri": uri, "stamp": "s1"} for uri in ("/a.mp4", "/b.mp4")]
    assert unseen(listing(*rows), tables.stamps)["uri"].to_pylist() == ["/b.mp4"]
    assert unseen(listing(*rows), forget(tables.stamps, ["/a.mp4"])).num_rows == 2


def test_a_failure_of_another_kind_is_said_anew() -> None:
    failed = facts("/a.mp4", pts_s=None, reason="time-out")
    poison = facts("/a.mp4", pts_s=None, reason="killed", status="quarantined")
    for before, now in ((failed, poison), (poison, failed)):
        known = {(before.video_id, before.uri): before.status}
        assert make_plan(recipe(), [now], known).videos["status"].to_pylist() == [now.status]
        assert make_plan(recipe(), [before], known).videos.num_rows == 0


def test_a_plan_without_clips_can_be_written_and_read(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_plan(folder, make_plan(recipe(), [facts("/a.mp4", pts_s=None, reason="broken")]))
    (plan,) = plans_of(folder)
    assert (plan.num_clips, plan.shards()) == (0, [])
    assert read_table(folder, plan.videos_name)["status"].to_pylist() == ["failed"]


def test_rows_that_say_all_are_planned_without_opening_anything() -> None:
    rows = [
        {"uri": f"s3://nowhere/{i}.mp4", "stamp": "", "digest": f"uri:{i}", "num_frames": 32, "fps": 8.0}
        for i in range(100)
    ]
    tables = make_plan(recipe(), read_facts(listing(*rows), probers(2)))
    assert tables.clips.num_rows == 200
    assert tables.clips["start_s"].to_pylist()[:2] == [0.0, 2.0]
    assert set(tables.videos["status"].to_pylist()) == {"planned"}


def test_an_unreadable_video_is_a_fact_with_its_reason() -> None:
    (fact,) = read_facts(listing({"uri": "/no/such/file.mp4", "stamp": "missing"}), probers(1))
    assert fact.pts_s is None
    assert fact.reason is not None
    assert "/no/such/file.mp4" in fact.reason


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    rows = [{"uri": uri, "stamp": "1"} for uri in ("/a", "/b", "/c")]
    old = pa.Table.from_pylist([row | {"video_id": "x"} for row in rows], schema=STAMP_SCHEMA)
    new = pa.Table.from_pylist([{"uri": "/b", "stamp": "2", "video_id": "y"}], schema=STAMP_SCHEMA)
    remember_stamps(folder, old, new)
    stamps = read_table(folder, "plan/stamps.parquet")
    now = [
        {"uri": "/a", "stamp": "1"},
        {"uri": "/b", "stamp": "2"},
        {"uri": "/c", "stamp": "9"},
        {"uri": "/d", "stamp": "1"},
    ]
    assert unseen(listing(*now), stamps)["uri"].to_pylist() == ["/c", "/d"]


@pytest.mark.parametrize("num_probers", [1, 3])
def test_the_number_of_probers_changes_nothing(num_probers: int) -> None:
    rows = [{"uri": f"/no/{i:02d}.mp4", "stamp": "missing"} for i in range(40)]
    found = list(read_facts(listing(*rows), probers(num_probers)))
    assert [fact.uri for fact in found] == [row["uri"] for row in rows]


def test_windows_within_one_long_shown_frame_are_different_clips() -> None:
    slides = facts("/slides.mp4", pts_s=np.array([0.0, 5.0, 10.0]), end_s=15.0)
    clips = make_plan(recipe(clips={"fps": 8}), [slides]).clips
    assert clips.num_rows == 8
    assert len(set(clips["clip_id"].to_pylist())) == 8


def test_a_broken_video_listed_twice_is_one_failure_and_a_duplicate() -> None:
    broken = [facts(uri, pts_s=None, reason="broken", video_id="z" * 64) for uri in ("/a.mp4", "/b.mp4")]
    assert make_plan(recipe(), broken).videos["status"].to_pylist() == ["failed", "duplicate"]
