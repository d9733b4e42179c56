"""tokenmill run: recipe -> plan -> executor -> index -> status."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from ..pipeline.commit import commit_manifests
from ..pipeline.executors import Report
from ..pipeline.index import ensure_index
from ..pipeline.manifests import compact_manifests
from ..pipeline.plan_file import plans_of
from ..pipeline.storage import Folder
from ..pipeline.video_texts import texts_of
from ..pipeline.work import MissingWork, missing_work
from ..pipeline.worker import Worker
from ..schemas.recipe import Recipe
from ..schemas.shard import WEBDATASET, ShardProgress, ShardReceipt, ShardTask, WorkerLost
from .build import build_driver_worker, build_executor, build_worker, check_executor, settled
from .display import Display, Meter
from .interruption import draining, raise_if_interrupted
from .plan import plan_cache
from .status import Status, read_status


def run_recipe(recipe: Recipe, display: Display) -> Status:
    """Make all that the recipe asks for and its cache lacks; returns the account of the cache.

    KeyboardInterrupt: the job was asked to stop before all was made.
    """
    check_executor(recipe)
    recipe = settled(recipe)
    worker = build_driver_worker(recipe)
    plan_cache(recipe, worker, display)
    return make_missing(recipe, worker, display)


def make_missing(recipe: Recipe, worker: Worker, display: Display) -> Status:
    """Make every shard of the cache's plans that lacks a product of `worker`; returns the account of the cache.

    KeyboardInterrupt: the job was asked to stop before all was made.
    """
    folder = worker.folder
    todo = missing_work(folder, plans_of(folder), worker.fingerprints)
    num_clips = sum(work.num_clips for work in todo)
    display.event("work", clips=num_clips, shards=len(todo), executor=recipe.executor.kind)
    commits = not todo or folder.can_create()
    if not commits:
        display.event(
            "coordinator", reason="the store has no create-if-absent: this process commits; run one job at a time"
        )
    worker = replace(worker, commits=commits)
    executor = build_executor(recipe, worker)
    make_worker = partial(build_worker, recipe, folder.url, commits=commits)
    with draining(recipe.executor.grace_s) as stop:
        with contextlib.closing(executor.run(tasks_of(folder, todo), make_worker, stop)) as reports:
            watch(reports, num_clips, folder, display)
        if stop.is_set() and missing_work(folder, plans_of(folder), worker.fingerprints):
            raise KeyboardInterrupt
    compact_manifests(folder)
    ensure_index(folder)
    return read_status(folder.url, asked=worker.fingerprints)


def tasks_of(folder: Folder, todo: Iterable[MissingWork]) -> Iterator[ShardTask]:
    """The tasks themselves, each read from its plan when an executor asks for it."""
    for work in todo:
        for task in work.tasks():
            with_texts = WEBDATASET in task.products
            yield replace(task, texts=texts_of(folder, work.plan, task.plan.clips)) if with_texts else task


def watch(reports: Iterable[Report], total: int, folder: Folder, display: Display) -> None:
    """Show what the executor reports until it is done, and commit what workers could not."""
    meter = Meter()
    for report in reports:
        raise_if_interrupted()
        if isinstance(report, ShardReceipt):
            num_lost = report.num_lost_races
            if not report.is_committed:
                num_lost = commit_manifests(folder, report.manifests, guarded=False)
            meter.add(shards=1, clips_written=report.manifests[0].num_rows if report.manifests else 0)
            meter.add_s(write=report.write_s)
            if num_lost:
                display.event("lost_race", shard=report.shard_id, manifests=num_lost)
        elif isinstance(report, WorkerLost):
            left = "given up, the next run tries it again" if report.is_given_up else "put back"
            display.event("worker_lost", shard=report.shard_id, reason=report.reason, shard_is=left)
        else:
            _show_progress(report, meter, display)
        display.progress("tokens", meter.counts["clips"] + meter.counts["failed"], total, meter.shown())


def _show_progress(report: ShardProgress, meter: Meter, display: Display) -> None:
    meter.add(
        clips=report.num_clips,
        frames=report.num_frames,
        tokens=report.num_tokens,
        failed=sum(failure.step != "segment" for failure in report.failures),
        unsegmented=sum(failure.step == "segment" for failure in report.failures),
        retries=report.num_retries,
    )
    meter.add_s(**report.timings_s)
    alike: dict[tuple[str, str, str], list[str]] = {}
    for failure in report.failures:
        alike.setdefault((failure.status, failure.step, failure.reason), []).append(failure.clip_id)
    for (status, step, reason), clip_ids in alike.items():
        display.event(status, clip=clip_ids[0], clips=len(clip_ids), step=step, reason=reason)
