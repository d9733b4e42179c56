"""Jobs that are hurt: whatever dies, and whenever, the cache ends as that of a job that was left alone."""

import itertools
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import MASKS, POISON, Contents, MakeJob, assert_same, contents_of, make_videos
from poison import append

from tokenmill.pipeline.cache import open_cache

RAY = {"kind": "ray", "workers": 2}
NUM_KILLS = [pytest.param(2, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.slow)]


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_drivers_killed_at_random_lose_nothing(make_job: MakeJob, whole: Contents, num_kills: int) -> None:
    chance, kills = random.Random(num_kills), 0
    while kills < num_kills:
        job = make_job(masks=MASKS)
        job.kill_drivers(num_kills - kills, chance, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        assert job.finish() == 0
        assert_same(job, whole)
        kills += job.counts.get("driver kills", 0)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("num_kills", "decode"),
    [
        pytest.param(kills, where, marks=pytest.mark.slow)
        for kills, where in ((2, "actor"), (50, "process"), (50, "actor"))
    ],
)
def test_workers_killed_at_random_lose_nothing(make_job: MakeJob, whole: Contents, num_kills: int, decode: str) -> None:
    chance, kills = random.Random(num_kills), 0
    kinds = ["token worker", "decoder"] + ["decode actor"] * (decode == "actor")
    while kills < num_kills:
        job = make_job(executor=RAY, decode={"run_in": decode}, masks=MASKS)
        job.kill_workers(kinds, num_kills - kills, chance, every_s=1.5)
        assert job.finish() == 0
        assert_same(job, whole)
        kills += job.counts.get("worker kills", 0)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_drivers_killed_at_random_lose_nothing(make_job: MakeJob, whole: Contents) -> None:
    job = make_job(executor=RAY)
    job.kill_drivers(8, random.Random(8), (signal.SIGKILL, signal.SIGTERM))
    assert job.finish() == 0
    assert_same(job, whole)


@pytest.mark.ray
@pytest.mark.slow
def test_machines_killed_at_random_lose_nothing(make_job: MakeJob, whole: Contents) -> None:
    from ray.cluster_utils import Cluster

    chance, kills = random.Random(5), 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        while kills < 5:
            job = make_job(executor=RAY | {"address": cluster.address})
            driver = job.begin()
            while driver.poll() is None:
                second = cluster.add_node(num_cpus=2)
                time.sleep(chance.uniform(2, 5))
                kills += driver.poll() is None
                cluster.remove_node(second, allow_graceful=False)  # SIGKILL to its raylet
            assert job.finish() == 0
            assert_same(job, whole)
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("num_videos", "executor"),
    [
        pytest.param(10, {}, marks=pytest.mark.slow),
        pytest.param(200, {}, marks=pytest.mark.slow),
        pytest.param(200, RAY, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_poison_is_quarantined_and_nothing_else(
    make_job: MakeJob, make_video: Callable[..., str], tmp_path: Path, num_videos: int, executor: dict
) -> None:
    kinds = ("segfault", "hang", "memory")
    num_poison = num_videos // 20 or 3
    make_videos(tmp_path / "videos", make_video(num_frames=40), num_videos)
    poisoned = [f"{i * (num_videos // num_poison):03d}.mp4" for i in range(num_poison)]
    for name, kind in zip(poisoned, itertools.cycle(kinds), strict=False):
        append(str(tmp_path / "videos" / name), f"{'probe' if name == poisoned[-1] else 'decode'} {kind}")
    job = make_job(
        sources=tmp_path / "videos",
        decode={"timeout_s": 2, "memory_mb": 700},
        executor=executor,
        tokens={"fake": {"tokenizer": "fake"}},
    )
    job.environment["PYTHONPATH"] = POISON
    assert job.finish(most_runs=1) == 3, job.said()
    found = open_cache(job.cache).sql("select distinct uri, status, attempts from failures order by uri").to_pylist()
    assert found == [
        {"uri": f"{tmp_path}/videos/{name}", "status": "quarantined", "attempts": 2} for name in sorted(poisoned)
    ]
    assert len(contents_of(job.cache).clip_ids) == 5 * (num_videos - num_poison)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(make_job: MakeJob, whole: Contents, disk: Path) -> None:
    job = make_job(cache=str(disk / "cache"))
    ballast = disk / "ballast"
    ballast.write_bytes(b"\1" * (shutil.disk_usage(disk).free - (200 << 10)))
    assert job.begin().wait(600) == 1
    assert "the disk is full: free some space and run again, what was committed is kept" in job.said()
    ballast.unlink()
    assert job.finish() == 0
    assert_same(job, whole)
