"""The Ray executor: token workers as actors, one shard at a time each. The only file that imports Ray."""

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from ..schemas.errors import TokenmillError
from ..schemas.recipe import ExecutorSection
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask
from .executors import MakeWorker
from .shard import process_shard


class TokenWorker:
    """An actor that holds one worker: models are loaded once, then shards come and go."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._worker = make_worker()

    @ray.method(num_returns="streaming")
    def process(self, task: ShardTask) -> Any:
        """Make one shard; only plans and receipts cross Ray."""
        yield from process_shard(task, self._worker)


class RayExecutor:
    """Token workers on a Ray of this machine (address="local") or on a running cluster."""

    def __init__(self, section: ExecutorSection) -> None:
        self._section = section

    def run(self, tasks: Iterable[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        started_here = not ray.is_initialized()
        if started_here:
            self._connect()
        try:
            yield from self._dispatch(iter(tasks), make_worker)
        finally:
            if started_here:
                ray.shutdown()

    def _connect(self) -> None:
        section = self._section
        options: dict[str, Any] = {"address": section.address, "log_to_driver": False}
        if section.address == "local":
            options |= {
                "include_dashboard": False,
                "num_cpus": max(1, int(section.workers * section.cpus_per_worker)),
            }
            if section.gpus_per_worker:
                options["num_gpus"] = None
        try:
            ray.init(logging_level=logging.ERROR, **{k: v for k, v in options.items() if v is not None})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TokenmillError(
                f"executor.address={section.address!r}: no Ray answers there ({error}):"
                f" give the address of a running cluster, auto, or local"
            ) from error

    def _dispatch(self, tasks: Iterator[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        section = self._section
        actor = ray.remote(
            num_cpus=section.cpus_per_worker,
            num_gpus=section.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )(TokenWorker)
        streams: dict[Any, Any] = {}
        waiting: dict[Any, Any] = {}
        for _ in range(section.workers):
            task = next(tasks, None)
            if task is None:
                break
            worker = actor.remote(make_worker)
            stream = worker.process.remote(task)
            streams[worker] = stream
        try:
            while streams:
                for worker, stream in streams.items():
                    if worker not in waiting:
                        waiting[worker] = stream
                ready, _ = ray.wait(list(waiting.values()), num_returns=1, fetch_local=False)
                for worker in [w for w, stream in waiting.items() if stream in ready]:
                    del waiting[worker]
                    try:
                        value = ray.get(next(streams[worker]))
                    except StopIteration:
                        del streams[worker]
                        task = next(tasks, None)
                        if task is not None:
                            streams[worker] = worker.process.remote(task)
                        continue
                    yield value
        finally:
            for worker in list(streams):
                ray.kill(worker)
