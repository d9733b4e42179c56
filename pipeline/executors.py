"""Executors: shard tasks in, progress and receipts out. This one works in the process itself."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask
from .shard import process_shard
from .worker import Worker

MakeWorker = Callable[[], Worker]


class Executor(Protocol):
    """Runs shards somewhere. The bytes in the cache are the same from every executor."""

    def run(self, tasks: Iterable[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        """Make every task; yields progress as it comes and one receipt per task, in any order.

        `make_worker` is called in every other process that works.
        """
        ...


class LocalExecutor:
    """One worker, in this process: the one given, since models need not be loaded twice."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, tasks: Iterable[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        for task in tasks:
            yield from process_shard(task, self._worker)


class FakeExecutor:
    """Commits nothing: yields an empty receipt per task and remembers the tasks, for tests of what is asked."""

    def __init__(self) -> None:
        self.tasks: list[ShardTask] = []

    def run(self, tasks: Iterable[ShardTask], make_worker: MakeWorker) -> Iterator[ShardProgress | ShardReceipt]:
        for task in tasks:
            self.tasks.append(task)
            yield ShardReceipt(shard_id=task.plan.shard_id, manifests=(), num_lost_races=0)
