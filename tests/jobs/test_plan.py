"""Planning: jobs that plan at once, and what a first claim binds."""

import itertools
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tokenmill.jobs.display import LineDisplay
from tokenmill.jobs.plan import claim_cache, update_plans
from tokenmill.pipeline.cache_head import read_info
from tokenmill.pipeline.plan_file import plans_of
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.cache_info import CacheInfo
from tokenmill.schemas.errors import CacheError
from tokenmill.schemas.recipe import Recipe, parse_recipe

NAMES = ("bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4")
NUMBERS = itertools.count()


@pytest.fixture
def videos(footage: Path) -> str:
    url = f"memory:///planned-{next(NUMBERS)}"
    for name in NAMES:
        with fsspec.open(f"{url}/{name}", "wb") as stream:
            stream.write((footage / name).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    return url


def recipe(cache: Path, *sources: str, **sections: Any) -> Recipe:
    values = {"cache": str(cache), "sources": sources, "tokens": {"fake": {"tokenizer": "fake"}}}
    return parse_recipe(values | sections)


def test_jobs_that_plan_at_once_plan_every_clip_once(videos: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "cache"))
    chosen = [names for size in (1, 2, 3) for names in itertools.combinations(NAMES, size)]
    jobs = [recipe(tmp_path / "cache", *(f"{videos}/{name}" for name in names)) for names in chosen]
    threads = [threading.Thread(target=update_plans, args=(job, folder, LineDisplay())) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plans = plans_of(folder)
    clips = [clip_id for plan in plans for shard in plan.clip_ids for clip_id in shard]
    alone = Folder(str(tmp_path / "alone"))
    (plan,) = update_plans(recipe(tmp_path / "alone", videos), alone, LineDisplay())
    assert sorted(clips) == sorted(clip_id for shard in plan.clip_ids for clip_id in shard)
    assert [plan.record.number for plan in plans] == list(range(1, len(plans) + 1))


def test_a_second_plan_of_the_same_videos_adds_none(videos: str, tmp_path: Path) -> None:
    folder, job = Folder(str(tmp_path / "cache")), recipe(tmp_path / "cache", videos)
    before = update_plans(job, folder, LineDisplay())
    assert [plan.name for plan in update_plans(job, folder, LineDisplay())] == [plan.name for plan in before]
    (tmp_path / "cache" / "plan" / "stamps.parquet").unlink()
    assert len(update_plans(job, folder, LineDisplay())) == 1


def test_another_sampling_is_refused_once_there_is_a_plan(videos: str, tmp_path: Path) -> None:
    folder, job = Folder(str(tmp_path / "cache")), recipe(tmp_path / "cache", videos)
    other = recipe(tmp_path / "cache", videos, clips={"height": 64})
    for claim in (job, other, job):
        claim_cache(folder, CacheInfo(recipe=claim.model_dump(mode="json"), products={}))
    update_plans(job, folder, LineDisplay())
    with pytest.raises(CacheError, match=r"made by another recipe, with clips.height=256 \(this recipe: 64\)"):
        claim_cache(folder, CacheInfo(recipe=other.model_dump(mode="json"), products={}))
    assert read_info(folder).recipe["clips"]["height"] == 256
