"""The Ray executor: token workers and decode actors that come and go. Beside ray_data no other file imports Ray."""

import contextlib
import itertools
import logging
import math
import os
import signal
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.exceptions
from ray.util import metrics

from ..schemas.clip import Clip, ClipFailure, ClipFrames
from ..schemas.errors import TokenmillError
from ..schemas.recipe import ExecutorSection
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask, WorkerLost
from .decoders import ClipDecoder
from .executors import MakeWorker, Report
from .isolation import resident_bytes
from .retries import add_retries, retry_counts
from .shard import process_shard

log = logging.getLogger(__name__)

MakeDecoder = Callable[[], ClipDecoder]
LEAVES = "leaves"  # the last word of a worker that takes no further shard
ATTEMPTS = 5  # workers that one shard may cost, and decode actors that one video may cost
CLIPS_PER_OBJECT = 8  # a message through Ray costs some milliseconds
OBJECTS_AHEAD = 2
TWIN_AFTER = 2.0  # a last shard that takes so many times the median is begun once more elsewhere
TWIN_AT_LEAST_S = 30.0
ACTOR_OPTIONS: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}  # retries are ours: counted and capped
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)


class DecodeActor:
    """Decodes for one token worker, on any machine of the cluster that has a CPU for it."""

    def __init__(self, make_decoder: MakeDecoder) -> None:
        self._decoder = make_decoder()

    @ray.method(num_returns="streaming")
    def decode(self, clips: Sequence[Clip]) -> Any:
        """Frames or failures of several clips at a time, with the requests to stores that were made again for them.

        They wait here until they are taken.
        """
        retries = retry_counts()
        with contextlib.closing(self._decoder.decode(clips)) as results:  # pyright: ignore[reportArgumentType]
            while chunk := list(itertools.islice(results, CLIPS_PER_OBJECT)):
                before, retries = retries, retry_counts()
                yield chunk, retries - before


class ActorDecoder:
    """The token worker's end of a decode actor. An actor that is lost is replaced, and asked for what is missing."""

    def __init__(self, make_decoder: MakeDecoder, wait_s: float) -> None:
        self._make_decoder, self._wait_s = make_decoder, wait_s
        self._actor: Any = None

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """One value for each of the `clips`; at most OBJECTS_AHEAD chunks of them lie in Ray's object store."""
        waiting = {clip.clip_id: clip for clip in clips}
        for attempt in range(ATTEMPTS):
            try:
                stream = self._started().decode.options(_generator_backpressure_num_objects=OBJECTS_AHEAD)
                for message in stream.remote(tuple(waiting.values())):
                    chunk, retries = ray.get(message)
                    add_retries(retries)
                    for result in chunk:
                        del waiting[result.clip_id if isinstance(result, ClipFailure) else result.clip.clip_id]
                        yield result
                return
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except LOST as error:
                log.warning("event=decode_actor_lost attempt=%d reason=%r", attempt + 1, _one_line(error))
                self._actor = None
        raise TokenmillError(f"{clips[0].video.uri}: {ATTEMPTS} decode actors were lost with it: run the recipe again")

    def close(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _started(self) -> Any:
        if self._actor is None:
            self._actor = ray.remote(num_cpus=1, **ACTOR_OPTIONS)(DecodeActor).remote(self._make_decoder)
            ready, _ = ray.wait([self._actor.__ray_ready__.remote()], timeout=self._wait_s)
            if not ready:
                raise TokenmillError(
                    f"no CPU came free for a decode actor in {self._wait_s:g} s: lower executor.workers or"
                    f" decode.processes, or set decode.run_in=process"
                )
        return self._actor


class TokenWorker:
    """An actor that holds one worker: models are loaded once, then shards come and go."""

    def __init__(self, make_worker: MakeWorker, decoders: Sequence[ActorDecoder], memory_mb: int | None) -> None:
        self._make_worker, self._decoders, self._memory_mb = make_worker, tuple(decoders), memory_mb
        self._leaving = threading.Event()

    def start(self) -> None:
        """Load the models. Not in the constructor, whose errors Ray reports as a lost actor."""
        worker = self._make_worker()
        self._worker = replace(worker, decoders=self._decoders) if self._decoders else worker
        self._meters = _Meters()
        # A machine that is taken back says so with SIGTERM: the shard in hand is finished, no other is taken.
        signal.signal(signal.SIGTERM, lambda number, frame: self._leaving.set())

    @ray.method(num_returns="streaming")
    def process(self, task: ShardTask) -> Any:
        """Make one shard; only plans, progress and receipts cross Ray."""
        if not self._leaving.is_set():
            for report in process_shard(task, self._worker):
                self._meters.record(report)
                yield report
        if self._leaving.is_set() or (self._memory_mb is not None and resident_bytes() > self._memory_mb << 20):
            yield LEAVES


class _Meters:
    """What this worker does, for Prometheus: Ray serves it on every machine."""

    def __init__(self) -> None:
        names = ("clips", "frames", "tokens", "failures", "store_retries")
        self._counts = {name: metrics.Counter(f"tokenmill_{name}") for name in names}
        self._seconds = metrics.Counter(
            "tokenmill_seconds", "Waiting for decoded frames, tokenizing, writing.", tag_keys=("step",)
        )
        self._queue = metrics.Gauge("tokenmill_queue_bytes", "Frames decoded ahead.")

    def record(self, report: ShardProgress | ShardReceipt) -> None:
        if isinstance(report, ShardReceipt):
            return self._add_seconds("write", report.write_s)
        counts = (report.num_clips, report.num_frames, report.num_tokens, len(report.failures), report.num_retries)
        for counter, count in zip(self._counts.values(), counts, strict=True):
            if count:
                counter.inc(count)
        for step, seconds in report.timings_s.items():
            self._add_seconds(step, seconds)
        self._queue.set(report.queue_bytes)

    def _add_seconds(self, step: str, seconds: float) -> None:
        if seconds > 0:
            self._seconds.inc(seconds, tags={"step": step})


class RayExecutor:
    """Token workers on a Ray of this machine (address="local") or on a running cluster.

    With `make_decoder` each of them has `num_decoders` decode actors, anywhere in the cluster.
    """

    def __init__(
        self, section: ExecutorSection, make_decoder: MakeDecoder | None = None, num_decoders: int = 0
    ) -> None:
        self._section, self._make_decoder, self._num_decoders = section, make_decoder, num_decoders

    def run(
        self, tasks: Iterable[ShardTask], make_worker: MakeWorker, stop: threading.Event
    ) -> Generator[Report, None, None]:
        """Make every task; a Ray that is started here is stopped at the end. Without a task none is started."""
        todo = iter(tasks)
        first = next(todo, None)
        if first is None:
            return
        section = self._section
        self._connect()
        try:
            self._check_room()
            actor = ray.remote(num_cpus=section.cpus_per_worker, num_gpus=section.gpus_per_worker, **ACTOR_OPTIONS)

            def hire() -> Any:
                make = self._make_decoder
                decoders = [ActorDecoder(make, section.wait_s) for _ in range(self._num_decoders)] if make else []
                return actor(TokenWorker).remote(make_worker, decoders, section.memory_mb)

            yield from _Dispatch(section, hire, itertools.chain([first], todo), stop).reports()
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise TokenmillError(
                f"Ray failed ({_one_line(error)}): what was committed is kept, run the recipe again to resume"
            ) from error
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        section = self._section
        options: dict[str, Any] = {"address": section.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if section.address == "local":
            num_cpus = math.ceil(section.workers * (section.cpus_per_worker + self._num_decoders)) or 1
            options |= {"include_dashboard": False, "num_cpus": num_cpus}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TokenmillError(
                f"executor.address={section.address!r}: no Ray answers there ({_one_line(error)}):"
                f" give the address of a running cluster, auto, or local"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray takes it, to exit at once

    def _check_room(self) -> None:
        """TokenmillError where this machine has no room for a worker; a cluster may yet grow."""
        found = ray.cluster_resources()
        has_room = all(found.get(kind, 0) >= share for kind, share in _shares(self._section).items())
        if not has_room and self._section.address == "local":
            raise _no_room(self._section)


@dataclass(slots=True)
class _Job:
    """A shard in the hands of a worker."""

    worker: Any
    task: ShardTask
    since_s: float
    has_receipt: bool = False
    leaves: bool = False

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What it makes: the same for twins."""
        return self.task.plan.shard_id, self.task.products


class _Dispatch:
    """Gives workers their shards, and takes back the shards of those that are lost."""

    def __init__(
        self, section: ExecutorSection, hire: Callable[[], Any], tasks: Iterator[ShardTask], stop: threading.Event
    ) -> None:
        self._section, self._hire, self._tasks, self._stop = section, hire, tasks, stop
        self._waiting: deque[ShardTask] = deque()
        self._starting: dict[Any, Any] = {}  # workers by the promise that they have started
        self._idle: list[Any] = []
        self._running: dict[Any, _Job] = {}  # by the stream of what each reports
        self._losses: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._lost_starts = 0
        self._done: set[tuple[str, tuple[str, ...]]] = set()
        self._took_s: list[float] = []
        self._last_busy_s = time.monotonic()

    def reports(self) -> Iterator[Report]:
        """Until every task has a receipt or is given up; once asked to stop, until those begun have."""
        while self._assign():
            ready, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=1.0)
            if self._running or self._idle:
                self._last_busy_s = time.monotonic()
            elif time.monotonic() - self._last_busy_s > self._section.wait_s:
                raise _no_room(self._section)
            for promise in ready:
                if promise in self._starting:
                    self._start(promise)
                else:
                    yield from self._hear(promise)

    def _assign(self) -> bool:
        """Give idle workers what there is to do, hire for what is left; False when nothing is left."""
        if self._stop.is_set():
            self._waiting.clear()
        else:
            self._hire_for_waiting()
        while self._idle and not self._stop.is_set():
            task = self._waiting.popleft() if self._has_waiting() else self._twin()
            if task is None:
                break
            worker = self._idle.pop()
            job = _Job(worker=worker, task=task, since_s=time.monotonic())
            self._running[worker.process.remote(task)] = job
        is_left = any(job.key not in self._done for job in self._running.values())
        return is_left or (not self._stop.is_set() and self._has_waiting())

    def _has_waiting(self, more_than: int = 0) -> bool:
        """Whether more than so many tasks wait for a worker; tasks are taken from their source as needed."""
        if len(self._waiting) <= more_than:
            self._waiting.extend(itertools.islice(self._tasks, 1))
        return len(self._waiting) > more_than

    def _hire_for_waiting(self) -> None:
        while len(self._starting) + len(self._idle) + len(self._running) < self._section.workers:
            if not self._has_waiting(more_than=len(self._starting) + len(self._idle)):
                return
            worker = self._hire()
            self._starting[worker.start.remote()] = worker

    def _twin(self) -> ShardTask | None:
        """A last shard that takes much longer than others did: whoever commits it first has made it."""
        running = Counter(job.key for job in self._running.values())
        late_s = max(TWIN_AT_LEAST_S, TWIN_AFTER * statistics.median(self._took_s)) if self._took_s else float("inf")
        now_s = time.monotonic()
        for job in self._running.values():
            if running[job.key] == 1 and job.key not in self._done and now_s - job.since_s > late_s:
                log.warning("event=twin shard=%s seconds=%.0f", job.task.plan.shard_id, now_s - job.since_s)
                return job.task
        return None

    def _start(self, promise: Any) -> None:
        """Take a worker that has started into service."""
        worker = self._starting.pop(promise)
        try:
            ray.get(promise)
        except LOST as error:
            self._lost_starts += 1
            log.warning("event=worker_lost_at_start n=%d reason=%r", self._lost_starts, _one_line(error))
            if self._lost_starts >= ATTEMPTS:
                raise TokenmillError(
                    f"{ATTEMPTS} token workers died while they started ({_one_line(error)}): what was committed is"
                    f" kept, run the recipe again to resume"
                ) from None
        else:
            self._lost_starts = 0
            self._idle.append(worker)

    def _hear(self, stream: Any) -> Iterator[Report]:
        """The next report of a worker, or what becomes of its end."""
        job = self._running[stream]
        try:
            report: Any = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            if not job.leaves:
                self._idle.append(job.worker)
            elif not job.has_receipt and job.key not in self._done:
                self._waiting.appendleft(job.task)
            return
        except LOST as error:
            del self._running[stream]
            yield from self._lose(job, error)
            return
        if report == LEAVES:
            job.leaves = True
            return
        if isinstance(report, ShardReceipt):
            job.has_receipt = True
            if job.key in self._done:
                return  # a twin came first
            self._done.add(job.key)
            self._took_s.append(time.monotonic() - job.since_s)
        yield report

    def _lose(self, job: _Job, error: Exception) -> Iterator[WorkerLost]:
        """Put the shard of a lost worker back, a limited number of times."""
        if job.has_receipt or job.key in self._done:
            return
        self._losses[job.key] += 1
        attempts = self._losses[job.key]
        if attempts < ATTEMPTS:
            self._waiting.appendleft(job.task)
        yield WorkerLost(
            shard_id=job.task.plan.shard_id,
            reason=_one_line(error),
            attempts=attempts,
            is_given_up=attempts >= ATTEMPTS,
        )


def _shares(section: ExecutorSection) -> dict[str, float]:
    return {"CPU": section.cpus_per_worker, "GPU": section.gpus_per_worker}


def _no_room(section: ExecutorSection) -> TokenmillError:
    wanted, found = _shares(section), ray.cluster_resources()
    has = {kind: found.get(kind, 0) for kind in wanted}
    return TokenmillError(f"one worker wants {wanted}, Ray at {section.address!r} has {has}: lower its shares")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
