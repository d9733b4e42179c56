"""Executors: shard tasks in, progress and receipts out. This one works in the process itself."""

import contextlib
import socket
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Protocol

from ..schemas.errors import TokenmillError
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask, WorkerLost
from .shard import process_shard
from .worker import Worker

MakeWorker = Callable[[], Worker]
Report = ShardProgress | ShardReceipt | WorkerLost


class Executor(Protocol):
    """Runs shards somewhere. The bytes in the cache are the same from every executor."""

    def run(
        self, tasks: Iterable[ShardTask], make_worker: MakeWorker, stop: threading.Event
    ) -> Generator[Report, None, None]:
        """Make every task; yields progress as it comes and one receipt per task, in any order.

        `make_worker` is called in every other process that works. Once `stop` is set no task is begun; those that
        are begun are finished, or abandoned when the generator is closed.
        """
        ...


class LocalExecutor:
    """One worker, in this process: the one given, since models need not be loaded twice."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(
        self, tasks: Iterable[ShardTask], make_worker: MakeWorker, stop: threading.Event
    ) -> Generator[Report, None, None]:
        try:
            for task in tasks:
                if stop.is_set():
                    return
                with contextlib.closing(process_shard(task, self._worker)) as reports:
                    yield from reports
        finally:
            for decoder in self._worker.decoders:
                decoder.close()


class FakeExecutor:
    """Commits nothing: yields an empty receipt per task and remembers the tasks, for tests of what is asked."""

    def __init__(self) -> None:
        self.tasks: list[ShardTask] = []

    def run(
        self, tasks: Iterable[ShardTask], make_worker: MakeWorker, stop: threading.Event
    ) -> Generator[Report, None, None]:
        for task in tasks:
            self.tasks.append(task)
            yield ShardReceipt(shard_id=task.plan.shard_id, manifests=(), num_lost_races=0)


def check_address(address: str) -> None:
    """TokenmillError where nothing listens at the address of a cluster, which Ray would wait for a long time."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdecimal():
        raise TokenmillError(
            f"executor.address={address!r}: accepted are local, auto, and host:port of a cluster's head; to work from"
            f" outside of a cluster use ray job submit"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise TokenmillError(
            f"executor.address={address!r}: no Ray answers there ({error}):"
            f" give the address of a running cluster, auto, or local"
        ) from error
