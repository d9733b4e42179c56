"""Trying again what failed or is quarantined."""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tokenmill.pipeline.plan_file import plans_of
from tokenmill.pipeline.retry_plan import plan_retries
from tokenmill.pipeline.snapshots import live_state
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.recipe import parse_recipe

from .conftest import Command

WriteRecipe = Callable[..., str]
ALL_CLIPS = 47
CARPHONE_CLIPS = 15
LATE = "carphone_pristine.mp4"
NUMBERS = itertools.count()


def files_in(folder: Path) -> dict[str, str]:
    """Every committed file and the digest of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".duckdb") and path.name not in ("stamps.parquet", "cache.json")
    }


def rows_of(tokenmill: Command, query: str) -> list[dict[str, Any]]:
    done = tokenmill("sql", "cache", query, "--format", "json")
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def counts_of(tokenmill: Command) -> dict[str, tuple[int, int, int]]:
    """Committed, failed and quarantined clips by product, having checked that the account closes."""
    assert tokenmill("verify", "cache", "--deep").out.count("problem: ") == 0
    products = json.loads(tokenmill("status", "cache", "--log-json").out)["products"]
    for one in products:
        assert one["planned"] == one["committed"] + one["failed"] + one["quarantined"]
    return {one["product"]: (one["committed"], one["failed"], one["quarantined"]) for one in products}


@dataclass(frozen=True, slots=True, kw_only=True)
class Videos:
    """A folder of two videos, one of which can be away. In fsspec's memory no decoder needs a process of its own."""

    url: str
    footage: Path

    def put(self, name: str, as_name: str | None = None) -> None:
        """Copy a video of the footage into the folder."""
        with fsspec.open(f"{self.url}/{as_name or name}", "wb") as stream:
            stream.write((self.footage / name).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]

    def remove(self, name: str) -> None:
        """Take a video away."""
        filesystem, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        filesystem.rm_file(path)


@pytest.fixture
def videos(footage: Path) -> Videos:
    made = Videos(url=f"memory:///retried-{next(NUMBERS)}", footage=footage)
    made.put("bikes.mp4")
    made.put(LATE)
    return made


@pytest.fixture
def failed(tokenmill: Command, write_recipe: WriteRecipe, videos: Videos) -> Videos:
    """The videos of a cache in which the clips of one failed, since it was away. It still is."""
    recipe = write_recipe([videos.url])
    assert tokenmill("plan", recipe).code == 0
    videos.remove(LATE)
    assert tokenmill("run", recipe).code == 3
    assert counts_of(tokenmill)["tokens/fake"] == (ALL_CLIPS - CARPHONE_CLIPS, CARPHONE_CLIPS, 0)
    return videos


def test_what_works_now_becomes_new_shards_and_no_old_file_is_touched(
    tokenmill: Command, failed: Videos, tmp_path: Path
) -> None:
    before = files_in(tmp_path / "cache")
    failed.put(LATE)
    done = tokenmill("retry", "cache")
    assert done.code == 0, done.err
    assert f"retry clips={CARPHONE_CLIPS} " in done.err
    assert counts_of(tokenmill) == {"clips": (ALL_CLIPS, 0, 0), "tokens/fake": (ALL_CLIPS, 0, 0)}
    after = files_in(tmp_path / "cache")
    assert {name: after[name] for name in before} == before
    assert rows_of(tokenmill, "select count(*) as n, count(distinct clip_id) as d from tokens_fake") == [
        {"n": ALL_CLIPS, "d": ALL_CLIPS}
    ]
    again = tokenmill("retry", "cache")
    assert (again.code, "nothing_to_retry" in again.err) == (0, True)
    assert files_in(tmp_path / "cache") == after


def test_a_retry_makes_the_rows_that_would_have_been_made(tokenmill: Command, failed: Videos, tmp_path: Path) -> None:
    failed.put(LATE)
    assert tokenmill("retry", "cache").code == 0
    query = "select clip_id, codes from tokens_fake order by clip_id"
    retried = tokenmill("sql", "cache", query, "--format", "csv").out
    assert tokenmill("run", "recipe.yaml", "--set", "cache=whole").code == 0
    assert tokenmill("sql", "whole", query, "--format", "csv").out == retried


def test_what_fails_again_is_tried_each_time_and_its_attempts_are_counted(tokenmill: Command, failed: Videos) -> None:
    query = "select distinct status, step, attempts from failures"
    assert rows_of(tokenmill, query) == [{"status": "failed", "step": "fetch", "attempts": 1}]
    shards = set()
    for attempts in (2, 3):
        done = tokenmill("retry", "cache")
        assert done.code == 3
        assert f"work clips={CARPHONE_CLIPS} " in done.err
        assert rows_of(tokenmill, query) == [{"status": "failed", "step": "fetch", "attempts": attempts}]
        shards |= {row["shard_id"] for row in rows_of(tokenmill, "select distinct shard_id from failures")}
        assert counts_of(tokenmill)["clips"] == (ALL_CLIPS - CARPHONE_CLIPS, CARPHONE_CLIPS, 0)
    assert len(shards) == 2 * len(rows_of(tokenmill, "select distinct shard_id from failures"))


def test_a_cache_without_failures_has_nothing_to_retry(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Videos, tmp_path: Path
) -> None:
    assert tokenmill("run", write_recipe([videos.url])).code == 0
    before = files_in(tmp_path / "cache")
    done = tokenmill("retry", "cache")
    assert (done.code, "nothing_to_retry" in done.err) == (0, True)
    assert files_in(tmp_path / "cache") == before
    events = [json.loads(line) for line in tokenmill("retry", "cache", "--log-json").out.splitlines()]
    assert [event["event"] for event in events] == ["nothing_to_retry"]


@pytest.mark.parametrize("command", [["retry", "cache"], ["run", "recipe.yaml"]])
def test_a_retry_that_was_only_planned_is_made_by_the_next_command(
    tokenmill: Command, failed: Videos, tmp_path: Path, command: list[str]
) -> None:
    failed.put(LATE)
    folder = Folder(str(tmp_path / "cache"))
    info = live_state(folder).info
    recipe = parse_recipe(info.recipe)
    assert len(plan_retries(folder, recipe, info.fingerprints)) == 1
    assert plan_retries(folder, recipe, info.fingerprints) == []
    assert tokenmill("status", "cache").code == 0
    done = tokenmill(*command)
    assert done.code == 0, done.err
    assert f"work clips={CARPHONE_CLIPS} " in done.err
    assert len(plans_of(folder)) == 2
    assert counts_of(tokenmill)["clips"] == (ALL_CLIPS, 0, 0)


@pytest.mark.slow
def test_retries_and_runs_at_once_commit_every_clip_once(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("bikes.mp4", LATE):
        shutil.copy(footage / name, tmp_path / "videos")
    recipe = write_recipe([tmp_path / "videos"])
    assert tokenmill("plan", recipe).code == 0
    (tmp_path / "videos" / LATE).unlink()
    assert tokenmill("run", recipe).code == 3
    shutil.copy(footage / LATE, tmp_path / "videos")
    code = "from tokenmill.jobs.main import main; main()"
    commands = [["retry", "cache"], ["run", "recipe.yaml"], ["retry", "cache"]]
    jobs = [subprocess.Popen([sys.executable, "-c", code, *command], cwd=tmp_path) for command in commands]
    assert {job.wait(timeout=120) for job in jobs} <= {0, 3}  # a run that ends before the retry sees failures
    assert tokenmill("retry", "cache").code == 0
    assert counts_of(tokenmill) == {"clips": (ALL_CLIPS, 0, 0), "tokens/fake": (ALL_CLIPS, 0, 0)}
    retries = [plan for plan in plans_of(Folder(str(tmp_path / "cache"))) if plan.is_retry]
    clips = [clip_id for plan in retries for shard in plan.clip_ids for clip_id in shard]
    assert len(clips) == len(set(clips)) == CARPHONE_CLIPS


def test_a_product_that_is_added_after_a_retry_has_every_clip_once(
    tokenmill: Command, write_recipe: WriteRecipe, failed: Videos
) -> None:
    failed.put(LATE)
    assert tokenmill("retry", "cache").code == 0
    both = {"fake": {"tokenizer": "fake", "batch_size": 4}, "other": {"tokenizer": "fake", "batch_size": 2}}
    done = tokenmill("run", write_recipe([failed.url], tokens=both))
    assert done.code == 0, done.err
    assert f"work clips={ALL_CLIPS} " in done.err
    assert counts_of(tokenmill)["tokens/other"] == (ALL_CLIPS, 0, 0)
    assert rows_of(tokenmill, "select count(*) as n, count(distinct clip_id) as d from tokens_other") == [
        {"n": ALL_CLIPS, "d": ALL_CLIPS}
    ]


def test_only_the_products_that_lack_a_clip_try_it_again(
    tokenmill: Command, write_recipe: WriteRecipe, failed: Videos, tmp_path: Path
) -> None:
    failed.put(LATE)
    both = {"fake": {"tokenizer": "fake", "batch_size": 4}, "other": {"tokenizer": "fake", "batch_size": 2}}
    assert tokenmill("run", write_recipe([failed.url], tokens=both)).code == 3
    whole, partial = (ALL_CLIPS, 0, 0), (ALL_CLIPS - CARPHONE_CLIPS, CARPHONE_CLIPS, 0)
    assert counts_of(tokenmill) == {"clips": partial, "tokens/fake": partial, "tokens/other": whole}
    assert tokenmill("retry", "cache").code == 0
    assert counts_of(tokenmill) == {"clips": whole, "tokens/fake": whole, "tokens/other": whole}
    retry = plans_of(Folder(str(tmp_path / "cache")))[-1]
    assert set(retry.record.retries) == {"clips", "tokens/fake"}


def test_a_shard_that_is_made_again_leaves_retried_clips_where_they_are(
    tokenmill: Command, write_recipe: WriteRecipe, failed: Videos, tmp_path: Path
) -> None:
    failed.put(LATE)
    assert tokenmill("retry", "cache").code == 0
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "manifests").rglob("*.json")]
    mixed = next(m for m in manifests if m["files"] and m["failures"] and m["product"] == "tokens/fake")
    (name,) = [file["name"] for file in mixed["files"]]
    whole = (tmp_path / "cache" / name).read_bytes()
    (tmp_path / "cache" / name).unlink()
    (line,) = [line for line in tokenmill("verify", "cache").out.splitlines() if line.startswith("problem: ")]
    (tmp_path / "cache" / line.partition("delete it and ")[2].partition(",")[0]).unlink()
    assert tokenmill("run", "recipe.yaml").code == 0
    assert (tmp_path / "cache" / name).read_bytes() == whole
    assert counts_of(tokenmill) == {"clips": (ALL_CLIPS, 0, 0), "tokens/fake": (ALL_CLIPS, 0, 0)}


def test_quarantined_clips_are_counted_apart_and_tried_again(
    tokenmill: Command, write_recipe: WriteRecipe, make_video: Callable[..., str]
) -> None:
    # A decoder may take 4 s for each second of video: of one this large and short, it cannot do with that.
    large = make_video("h264", num_frames=8, width=3840, height=2160, fps=1000)
    recipe = write_recipe([large])
    assert tokenmill("plan", recipe).code == 0
    done = tokenmill("run", recipe, "--set", "decode.timeout_s=0.001")
    assert done.code == 3, done.err
    assert counts_of(tokenmill) == {"clips": (0, 0, 1), "tokens/fake": (0, 0, 1)}
    (row,) = rows_of(tokenmill, "select distinct status, step, attempts from failures")
    assert row == {"status": "quarantined", "step": "decode", "attempts": 2}
    assert "quarantined clips are of 1 videos" in tokenmill("status", "cache").out
    again = tokenmill("run", recipe)
    assert (again.code, "clips=0 shards=0" in again.err) == (3, True)
    assert tokenmill("retry", "cache").code == 0
    assert counts_of(tokenmill) == {"clips": (1, 0, 0), "tokens/fake": (1, 0, 0)}


@pytest.mark.slow
def test_quarantined_videos_wait_for_a_retry_and_then_are_planned(
    tokenmill: Command, write_recipe: WriteRecipe, make_video: Callable[..., str]
) -> None:
    # The times of such a file are known only once all of it is decoded, which takes more than no time.
    slow = make_video("mpeg_ts", num_frames=400, width=1280, height=720)
    clips = {"num_frames": 8, "height": 32, "width": 48, "cut": "whole"}
    recipe = write_recipe([slow], clips=clips)
    assert tokenmill("run", recipe, "--set", "decode.timeout_s=0.001").code == 3
    query = "select status, step, clip_id from failures"
    assert rows_of(tokenmill, query) == [{"status": "quarantined", "step": "probe", "clip_id": None}]
    assert "videos: 1 quarantined" in tokenmill("status", "cache").out
    again = tokenmill("run", recipe)
    assert (again.code, "unchanged=1" in again.err) == (3, True)
    assert tokenmill("retry", "cache").code == 0
    assert rows_of(tokenmill, "select status, num_clips from videos") == [{"status": "planned", "num_clips": 1}]
    assert counts_of(tokenmill)["clips"] == (1, 0, 0)


def test_videos_that_could_not_be_read_are_tried_again_too(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Videos, footage: Path
) -> None:
    with fsspec.open(f"{videos.url}/broken.mp4", "wb") as stream:
        stream.write(b"not a video")  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenmill("run", write_recipe([videos.url])).code == 3
    done = tokenmill("retry", "cache")
    assert (done.code, "retry clips=0 shards=0 plans=0 videos=1" in done.err) == (3, True)
    with fsspec.open(f"{videos.url}/broken.mp4", "wb") as stream:
        stream.write((footage / "carphone_distorted.mp4").read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenmill("retry", "cache").code == 0
    assert counts_of(tokenmill)["clips"] == (ALL_CLIPS + CARPHONE_CLIPS, 0, 0)


def test_a_retry_that_would_make_another_version_is_refused(tokenmill: Command, failed: Videos) -> None:
    done = tokenmill("retry", "cache", "--set", "tokens.fake.batch_size=2")
    assert done.code == 1
    assert "tokens/fake would be another version: its settings, weights, tokenizer or decoder are not" in done.err
    assert "--set 'nonsense': accepted is key=value" in tokenmill("retry", "cache", "--set", "nonsense").err


def test_a_cache_that_was_moved_is_retried_where_it_is(tokenmill: Command, failed: Videos, tmp_path: Path) -> None:
    failed.put(LATE)
    (tmp_path / "cache").rename(tmp_path / "moved")
    done = tokenmill("retry", "moved")
    assert done.code == 0, done.err
    assert not (tmp_path / "cache").exists()
