"""The Ray executor: token workers as actors, one shard at a time each. The only file that imports Ray."""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions

from ..schemas.errors import TokenmillError
from ..schemas.recipe import ExecutorSection
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask
from .executors import MakeWorker
from .shard import process_shard

log = logging.getLogger(__name__)


class TokenWorker:
    """An actor that holds one worker: models are loaded once, then shards come and go."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._worker = make_worker()

    @ray.method(num_returns="streaming")
    def process(self, task: ShardTask) -> Any:
        """Make one shard; only plans, progress and receipts cross Ray."""
        yield from process_shard(task, self._worker)


class RayExecutor:
    """Token workers on a Ray of this machine (address="local") or on a running cluster."""

    def __init__(self, section: ExecutorSection) -> None:
        self._section = section

    def run(self, tasks: Iterable[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        """Make every task; a Ray that is started here is stopped at the end. Without a task none is started."""
        todo = iter(tasks)
        first = next(todo, None)
        if first is None:
            return
        self._connect()
        try:
            yield from self._dispatch(first, todo, make_worker)
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise TokenmillError(
                f"a token worker was lost ({' '.join(str(error).split())[:300]}): what was committed is kept,"
                f" run the recipe again to resume"
            ) from error
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        section = self._section
        options: dict[str, Any] = {"address": section.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if section.address == "local":
            num_cpus = max(1, round(section.workers * section.cpus_per_worker))
            options |= {"include_dashboard": False, "num_cpus": num_cpus}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TokenmillError(
                f"executor.address={section.address!r}: no Ray answers there ({' '.join(str(error).split())[:200]}):"
                f" give the address of a running cluster, auto, or local"
            ) from error

    def _num_workers(self) -> int:
        """As many workers as were asked for and as Ray has room for; TokenmillError where there is room for none."""
        section, found = self._section, ray.cluster_resources()
        wanted = {"CPU": section.cpus_per_worker, "GPU": section.gpus_per_worker}
        room = min(
            (int(found.get(kind, 0) / share) for kind, share in wanted.items() if share), default=section.workers
        )
        if not room:
            has = {kind: found.get(kind, 0) for kind in wanted}
            raise TokenmillError(f"one worker wants {wanted}, Ray at {section.address!r} has {has}: lower its shares")
        if room < section.workers:
            log.warning("event=fewer_workers asked=%d room=%d", section.workers, room)
        return min(room, section.workers)

    def _dispatch(
        self, first: ShardTask, rest: Iterator[ShardTask], make_worker: MakeWorker
    ) -> Iterator[ShardProgress | ShardReceipt]:
        """Give every worker a task, and the next one when it is done; pass on what they report."""
        section = self._section
        actor = ray.remote(
            num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, max_restarts=0, max_task_retries=0
        )(TokenWorker)
        workers: dict[Any, Any] = {}  # by the stream of what each reports
        for task in itertools.chain([first], itertools.islice(rest, self._num_workers() - 1)):
            worker = actor.remote(make_worker)
            workers[worker.process.remote(task)] = worker
        while workers:
            ready, _ = ray.wait(list(workers), num_returns=1)
            stream: Any = ready[0]
            try:
                report: Any = ray.get(next(stream))
                yield report
            except StopIteration:
                worker = workers.pop(stream)
                task = next(rest, None)
                if task is not None:
                    workers[worker.process.remote(task)] = worker
