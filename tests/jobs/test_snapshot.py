"""Snapshots read the state that was pinned, whatever is added later: videos, changed videos, versions, retries."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmill as package
from tokenmill.pipeline.cache import open_cache

from .conftest import Command
from .test_retry import ALL_CLIPS, CARPHONE_CLIPS, LATE, Videos, counts_of, files_in, rows_of

WriteRecipe = Callable[..., str]
CODES = "select clip_id, codes from tokens_fake order by clip_id"
NUMBERS = itertools.count()


@pytest.fixture
def videos(footage: Path) -> Videos:
    made = Videos(url=f"memory:///pinned-{next(NUMBERS)}", footage=footage)
    made.put("bikes.mp4")
    made.put(LATE)
    return made


@pytest.fixture
def cache(tokenmill: Command, write_recipe: WriteRecipe, videos: Videos, tmp_path: Path) -> Path:
    """A cache with snapshot 1."""
    assert tokenmill("run", write_recipe([videos.url])).code == 0
    assert "snapshot 1: " in tokenmill("snapshot", "cache").out
    return tmp_path / "cache"


def answer_at(tokenmill: Command, number: int | None, query: str = CODES) -> str:
    done = tokenmill("sql", "cache", query, "--format", "csv", *(["--snapshot", str(number)] if number else []))
    assert done.code == 0, done.err
    return done.out


def products_at(tokenmill: Command, number: int) -> dict[str, int]:
    status = json.loads(tokenmill("status", "cache", "--log-json", "--snapshot", str(number)).out)
    return {one["product"]: one["committed"] for one in status["products"]}


def test_the_same_state_is_pinned_once(tokenmill: Command, cache: Path) -> None:
    before = files_in(cache)
    again = tokenmill("snapshot", "cache")
    assert (again.code, again.out.startswith("snapshot 1 of 20")) == (0, True)
    assert "none was added" in again.out
    assert files_in(cache) == before
    assert open_cache("cache").snapshot() == 1
    assert open_cache("cache", snapshot=1).snapshot() == 1


def test_added_videos_give_only_new_shards_and_a_snapshot_does_not_see_them(
    tokenmill: Command, videos: Videos, cache: Path
) -> None:
    before, answer = files_in(cache), answer_at(tokenmill, None)
    videos.put("carphone_distorted.mp4")
    done = tokenmill("run", "recipe.yaml")
    assert (done.code, f"work clips={CARPHONE_CLIPS} " in done.err) == (0, True)
    after = files_in(cache)
    assert {name: after[name] for name in before} == before
    assert counts_of(tokenmill)["clips"] == (ALL_CLIPS + CARPHONE_CLIPS, 0, 0)
    assert answer_at(tokenmill, 1) == answer
    assert products_at(tokenmill, 1) == {"clips": ALL_CLIPS, "tokens/fake": ALL_CLIPS}
    assert len(answer_at(tokenmill, None).splitlines()) == 1 + ALL_CLIPS + CARPHONE_CLIPS


def test_a_changed_video_is_a_new_video_beside_the_old_one(tokenmill: Command, videos: Videos, cache: Path) -> None:
    before, answer = files_in(cache), answer_at(tokenmill, None)
    videos.put("carphone_distorted.mp4", as_name=LATE)
    done = tokenmill("run", "recipe.yaml")
    assert (done.code, f"work clips={CARPHONE_CLIPS} " in done.err) == (0, True)
    assert {name: digest for name, digest in files_in(cache).items() if name in before} == before
    (row,) = rows_of(
        tokenmill, f"select count(*) as n, count(distinct video_id) as d from videos where uri like '%{LATE}'"
    )
    assert row == {"n": 2, "d": 2}
    assert counts_of(tokenmill)["clips"] == (ALL_CLIPS + CARPHONE_CLIPS, 0, 0)
    assert answer_at(tokenmill, 1) == answer


def test_a_changed_product_is_a_new_version_and_the_snapshot_reads_the_old_one(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Videos, cache: Path
) -> None:
    before, answer = files_in(cache), answer_at(tokenmill, None)
    changed = {"fake": {"tokenizer": "dct_fsq/488_32768", "batch_size": 2}}
    done = tokenmill("run", write_recipe([videos.url], tokens=changed))
    assert done.code == 0, done.err
    added = files_in(cache).keys() - before.keys()
    assert added
    assert all("tokens/fake/" in name for name in added)
    assert {name: digest for name, digest in files_in(cache).items() if name in before} == before
    assert answer_at(tokenmill, None) != answer
    assert answer_at(tokenmill, 1) == answer
    assert tokenmill("snapshot", "cache").out.startswith("snapshot 2: ")
    assert products_at(tokenmill, 2) == products_at(tokenmill, 1)
    back = tokenmill("run", write_recipe([videos.url]))
    assert (back.code, "work clips=0 " in back.err) == (0, True)
    assert answer_at(tokenmill, None) == answer
    assert answer_at(tokenmill, 2) != answer


def test_a_retry_changes_no_snapshot(
    tokenmill: Command, write_recipe: WriteRecipe, videos: Videos, tmp_path: Path
) -> None:
    recipe = write_recipe([videos.url])
    assert tokenmill("plan", recipe).code == 0
    videos.remove(LATE)
    assert tokenmill("run", recipe).code == 3
    assert tokenmill("snapshot", "cache").code == 0
    videos.put(LATE)
    assert tokenmill("retry", "cache").code == 0
    assert tokenmill("status", "cache", "--snapshot", "1").out.count(f" {CARPHONE_CLIPS} ") == 3
    assert products_at(tokenmill, 1)["clips"] == ALL_CLIPS - CARPHONE_CLIPS
    assert tokenmill("status", "cache").code == 0
    assert counts_of(tokenmill)["clips"] == (ALL_CLIPS, 0, 0)


def test_a_snapshots_index_is_its_own(tokenmill: Command, cache: Path) -> None:
    live = answer_at(tokenmill, None)
    index = (cache / "index.duckdb").read_bytes()
    assert answer_at(tokenmill, 1) == live
    assert (cache / "index.duckdb").read_bytes() == index
    (cache / "index-1.duckdb").unlink()
    assert answer_at(tokenmill, 1) == live


def test_loaders_and_copies_keep_the_snapshot(tokenmill: Command, videos: Videos, cache: Path) -> None:
    pinned = package.open_cache(str(cache), snapshot=1)
    videos.put("carphone_distorted.mp4")
    assert tokenmill("run", "recipe.yaml").code == 0
    copy = pickle.loads(pickle.dumps(pinned))
    for one in (pinned, copy):
        ids = [clip_id for batch in one.loader("fake", 16) for clip_id in batch["clip_id"]]
        assert len(ids) == ALL_CLIPS
    now = package.open_cache(str(cache))
    assert sum(len(batch["clip_id"]) for batch in now.loader("fake", 16)) == ALL_CLIPS + CARPHONE_CLIPS
    assert torch.equal(copy.read("fake", ids), now.read("fake", ids))


def test_snapshots_are_listed(tokenmill: Command, videos: Videos, cache: Path) -> None:
    videos.put("carphone_distorted.mp4")
    assert tokenmill("run", "recipe.yaml").code == 0
    assert tokenmill("snapshot", "cache").out.startswith("snapshot 2: ")
    lines: list[Any] = [line.split() for line in tokenmill("snapshot", "cache", "--list").out.splitlines()]
    rows = [line for line in lines if line and line[0].isdecimal()]
    assert [(row[0], row[2:4], row[-1]) for row in rows] == [
        ("1", ["clips,", "tokens/fake"], "1"),
        ("2", ["clips,", "tokens/fake"], "2"),
    ]
    assert len(list((cache / "snapshots").glob("*.json"))) == 2


@pytest.mark.parametrize("command", ["sql", "status", "reconstruct"])
def test_a_snapshot_that_is_not_there_is_said(tokenmill: Command, cache: Path, command: str) -> None:
    rest = {"sql": ["select 1"], "reconstruct": ["abc", "x.mp4"]}.get(command, [])
    done = tokenmill(command, "cache", *rest, "--snapshot", "7")
    assert (done.code, "no snapshot 7; there are 1" in done.err) == (1, True)
