"""The Ray executor: workers and nodes come and go, and every shard is made."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tokenmill.jobs.build import build_executor, build_worker
from tokenmill.pipeline import ray_executor
from tokenmill.pipeline.executors import Report, check_address
from tokenmill.pipeline.sources import list_sources
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.clip import Clip, Video
from tokenmill.schemas.errors import TokenmillError
from tokenmill.schemas.recipe import Recipe, parse_recipe
from tokenmill.schemas.shard import ShardPlan, ShardProgress, ShardReceipt, ShardTask, WorkerLost

FAULTS = str(Path(__file__).parents[1] / "faults")
pytestmark = pytest.mark.ray


@pytest.fixture
def recipe(make_video: Callable[..., str], tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(decode={...}, **executor): a job of twelve videos of nine clips, a shard for each."""
    (tmp_path / "videos").mkdir()
    for i in range(12):
        shutil.copy(make_video(), tmp_path / "videos" / f"{i:02d}.mp4")
        with open(tmp_path / "videos" / f"{i:02d}.mp4", "ab") as stream:
            stream.write((12).to_bytes(4, "big") + b"free" + f"{i:04d}".encode())

    def make(decode: dict | None = None, **executor: Any) -> Recipe:
        return parse_recipe(
            {
                "cache": str(tmp_path / "cache"),
                "sources": [str(tmp_path / "videos")],
                "clips": {"num_frames": 4, "height": 32, "width": 48},
                "tokens": {"fake": {"tokenizer": "fake", "batch_size": 2}},
                "shards": {"frames": 36},
                "decode": decode or {},
                "executor": {"kind": "ray", "workers": 1} | executor,
            }
        )

    return make


def tasks_of(recipe: Recipe, products: Sequence[str]) -> Iterator[ShardTask]:
    """A shard of nine clips for every video."""
    for path in list_sources(recipe.sources)["uri"].to_pylist():
        video = Video(uri=path, size_bytes=-1, digest=f"uri:{path}")
        times = [tuple((4 * i + k) / 25 for k in range(4)) for i in range(9)]
        clips = tuple(
            Clip(clip_id=f"{Path(path).stem}{t[0]}", video=video, start_s=t[0], end_s=t[-1] + 0.04, frame_pts_s=t)
            for t in times
        )
        yield ShardTask(plan=ShardPlan(shard_id=Path(path).stem, clips=clips), products=tuple(products))


def reports_of(recipe: Recipe) -> Iterator[Report]:
    """What the executor reports while it makes twelve shards."""
    worker = build_worker(recipe)
    tasks = tasks_of(recipe, list(worker.fingerprints))
    return build_executor(recipe, worker).run(tasks, partial(build_worker, recipe), threading.Event())


def shards_in(reports: list[Report]) -> list[str]:
    return [report.shard_id for report in reports if isinstance(report, ShardReceipt)]


def rows_in(recipe: Recipe) -> int:
    import pyarrow.parquet as pq

    folder = Folder(recipe.cache)
    return sum(pq.read_metadata(folder.path(name)).num_rows for name in folder.list("tokens/fake"))


@pytest.fixture
def of_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """of_kind("token worker"): such processes that this one has started."""
    monkeypatch.syspath_prepend(FAULTS)
    import processes  # pyright: ignore[reportMissingImports]

    yield processes.of_kind
    del sys.modules["processes"]


@pytest.mark.slow  # the fast set has tests/faults, where the same dies at random moments
@pytest.mark.parametrize("kind", ["token worker", "decode actor", "decoder"])
def test_a_process_that_is_killed_costs_no_clip(
    recipe: Callable[..., Recipe], of_kind: Callable[..., list[Any]], kind: str
) -> None:
    job = recipe(decode={"run_in": "actor"}, workers=1)
    reports, killed = [], []
    for report in reports_of(job):
        reports.append(report)
        if isinstance(report, ShardReceipt) and len(shards_in(reports)) in (2, 5):
            victim = of_kind(kind)[-1]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)
    assert len(set(killed)) == 2, reports
    assert len(shards_in(reports)) == len(set(shards_in(reports))) == 12
    assert rows_in(job) == 12 * 9
    lost = [report for report in reports if isinstance(report, WorkerLost)]
    assert len(lost) <= (2 if kind == "token worker" else 0)  # one may have been between two shards
    assert not any(report.is_given_up for report in lost)
    assert not any(report.failures for report in reports if isinstance(report, ShardProgress))


@pytest.mark.slow
def test_a_worker_that_is_asked_to_leave_finishes_its_shard(
    recipe: Callable[..., Recipe], of_kind: Callable[..., list[Any]]
) -> None:
    reports, workers = [], set()
    for report in reports_of(recipe()):
        reports.append(report)
        workers |= {process.pid for process in of_kind("token worker")}
        if isinstance(report, ShardProgress) and len(shards_in(reports)) == 3:
            for process in of_kind("token worker"):
                os.kill(process.pid, signal.SIGTERM)
    assert len(shards_in(reports)) == 12
    assert len(workers) > 1
    assert not [report for report in reports if isinstance(report, WorkerLost)]


@pytest.mark.slow
def test_a_worker_that_grows_is_replaced_after_its_shard(
    recipe: Callable[..., Recipe], of_kind: Callable[..., list[Any]]
) -> None:
    reports, workers = [], set()
    for report in reports_of(recipe(memory_mb=256)):  # less than torch takes
        reports.append(report)
        workers |= {process.pid for process in of_kind("token worker")}
        if len(shards_in(reports)) == 3:
            break
    assert len(workers) >= 3
    assert not [report for report in reports if isinstance(report, WorkerLost)]


@pytest.mark.slow
def test_nodes_join_and_leave_while_the_job_runs(recipe: Callable[..., Recipe]) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    reports: list[Report] = []
    try:
        job = recipe(address=cluster.address, workers=3)
        second = None
        for report in reports_of(job):
            reports.append(report)
            if second is None:  # two of three workers wait for room
                second = cluster.add_node(num_cpus=2)
            elif len(shards_in(reports)) == 6 and second in cluster.list_all_nodes():
                cluster.remove_node(second, allow_graceful=False)
    finally:
        cluster.shutdown()
    assert len(set(shards_in(reports))) == 12
    assert rows_in(job) == 12 * 9
    assert not any(report.is_given_up for report in reports if isinstance(report, WorkerLost))


@pytest.mark.slow
def test_a_last_shard_that_hangs_is_made_by_a_twin(
    recipe: Callable[..., Recipe], of_kind: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "TWIN_AT_LEAST_S", 2.0)
    reports: list[Report] = []
    stopped = None
    for report in reports_of(recipe(workers=2)):
        reports.append(report)
        workers = of_kind("token worker")
        if stopped is None and len(shards_in(reports)) >= 4 and len(workers) == 2:
            stopped = workers[0].pid
            os.kill(stopped, signal.SIGSTOP)
    assert stopped is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGKILL)
    assert len(shards_in(reports)) == len(set(shards_in(reports))) == 12
    assert not [report for report in reports if isinstance(report, WorkerLost)]


@pytest.mark.slow
def test_what_workers_wait_for_is_a_metric(recipe: Callable[..., Recipe]) -> None:
    import ray

    wanted = ("tokenmill_frames", "tokenmill_tokens", 'step="decode"', 'step="tokenize"', "tokenmill_queue_bytes")
    text = ""
    for report in reports_of(recipe()):
        if isinstance(report, ShardReceipt) and not all(name in text for name in wanted):
            port = ray.nodes()[0]["MetricsExportPort"]
            for _ in range(60):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
                if all(name in text for name in wanted):
                    break
                time.sleep(0.5)
    assert [name for name in wanted if name not in text] == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray answers there"),
        ("ray://127.0.0.1:10001", "to work from outside of a cluster use ray job submit"),
        ("somewhere", "accepted are local, auto, and host:port"),
    ],
)
def test_an_address_where_no_cluster_can_be_is_refused(address: str, said: str) -> None:
    with pytest.raises(TokenmillError, match=said):
        check_address(address)
