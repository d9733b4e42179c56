"""Plans in a cache: numbered, one writer to a number, and nothing planned twice."""

import threading
from pathlib import Path

import pytest

from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import next_number, plan_names, plans_of, write_plan
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError

from ..conftest import Store
from .test_plan import MANY, facts, recipe


def test_plans_come_in_the_order_of_their_numbers(store: Store) -> None:
    folder = Folder(store.url)
    for number in range(1, 12):
        assert write_plan(folder, make_plan(recipe(), [facts(f"/{number}.mp4")]), number=number)
    plans = plans_of(folder)
    assert [plan.record.number for plan in plans] == list(range(1, 12))
    assert [plan.shard(0).clips[0].video.uri for plan in plans] == [f"/{n}.mp4" for n in range(1, 12)]
    assert next_number(plans) == 12


def test_of_many_jobs_one_gets_a_number_and_the_others_know(tmp_path: Path) -> None:
    folder, won = Folder(str(tmp_path)), []

    def race(i: int) -> None:
        plan = write_plan(folder, make_plan(recipe(), [facts(f"/{i}.mp4"), *MANY[:3]]), number=1)
        if plan:
            won.append(plan.name)

    racers = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert won == [plan.name for plan in plans_of(folder)]
    assert len(won) == 1


def test_files_of_a_plan_that_lost_are_no_plan(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert write_plan(folder, make_plan(recipe(), MANY[:2]), number=1)
    assert write_plan(folder, make_plan(recipe(), MANY[:3]), number=1) is None
    assert len(list((tmp_path / "plan").glob("clips-*"))) == 2
    assert plan_names(folder) == ["plan/plan-000001.json"]


def test_a_retry_is_about_its_product_versions_only(tmp_path: Path) -> None:
    folder, tables = Folder(str(tmp_path)), make_plan(recipe(), MANY[:2])
    first = write_plan(folder, tables)
    retry = write_plan(folder, tables, number=2, retries={"clips": "v1"})
    assert first is not None
    assert retry is not None
    assert (first.is_retry, retry.is_retry) == (False, True)
    assert (first.covers("clips", "v9"), first.covers("tokens/new", "v1")) == (True, True)
    assert (retry.covers("clips", "v1"), retry.covers("clips", "v2"), retry.covers("tokens/a", "v1")) == (
        True,
        False,
        False,
    )
    assert [clip for ids in retry.clip_ids for clip in ids] == tables.clips["clip_id"].to_pylist()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"{", "plan-000001.json: damaged plan .*delete the plan folder and run the recipe again"),
        (b'{"format_version": 9}', "plan-000001.json: format version 9, this tokenmill reads 1"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: bytes, message: str) -> None:
    folder = Folder(str(tmp_path))
    write_plan(folder, make_plan(recipe(), MANY[:1]))
    (tmp_path / "plan" / "plan-000001.json").write_bytes(damage)
    with pytest.raises(CacheError, match=message):
        plans_of(folder)
