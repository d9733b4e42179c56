"""What is known of each listed video: from the source's own columns, or by reading and probing it."""

import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from ..schemas.clip import FailureStatus
from ..schemas.digest import digest_of, digest_of_stream
from ..schemas.errors import StorageError, TokenmillError
from .fetch import local_file
from .isolation import Child, Poison, Serve, stream_with_strikes
from .probe import probe_video
from .retries import apply_storage_options

AHEAD_PER_PROBER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """One listed video: its identity, and the times of its frames or the reason why there are none.

    `is_regular` says that the times are not known but follow from the frame rate that the source declares;
    `status`, `attempts` and `log_tail` are as in ClipFailure where there are no times.
    """

    uri: str
    stamp: str
    video_id: str
    size_bytes: int
    caption: str | None
    metadata: str | None
    pts_s: np.ndarray | None
    is_regular: bool
    end_s: float
    fps: float | None
    width: int | None
    height: int | None
    codec: str | None
    reason: str | None
    status: FailureStatus = "failed"
    attempts: int = 1
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What is known of a video before it is opened."""

    video_id: str
    size_bytes: int


class Prober:
    """Reads the facts of one video after the other in a child process; poison is a quarantined row."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]], timeout_s: float, memory_mb: int) -> None:
        self._child = Child(partial(serve_facts, options), memory_mb)
        self._timeout_s = timeout_s

    def facts(self, row: dict) -> VideoFacts:
        """The facts of a row of SOURCE_SCHEMA."""
        if row["uri"].startswith("memory://"):  # no other process can see it
            *_, facts = probe_row(row)
            assert isinstance(facts, VideoFacts)
            return facts
        identity = facts = None
        try:
            for value in stream_with_strikes(self._child, row["uri"], lambda: row):
                if isinstance(value, VideoFacts):
                    facts = value
                else:
                    identity = value
                    self._child.allow_s(self._timeout_s)
            assert facts is not None
            return facts
        except Poison as poison:
            known = asdict(identity) if identity else {"video_id": row["digest"] or f"uri:{digest_of(row['uri'])}"}
            known |= {"reason": poison.reason, "attempts": poison.attempts, "log_tail": poison.log_tail}
            return _facts(row, **known, status="quarantined")

    def close(self) -> None:
        """End the child."""
        self._child.close()


def read_facts(listing: pa.Table, probers: Sequence[Prober]) -> Iterator[VideoFacts]:
    """The facts of every row of `listing` (SOURCE_SCHEMA), in its order, reading only what the row leaves open."""
    rows = (row for batch in listing.to_batches(max_chunksize=4096) for row in batch.to_pylist())
    waiting: deque[VideoFacts | Future[VideoFacts]] = deque()
    free: queue.LifoQueue[Prober] = queue.LifoQueue()  # the last first: few videos start few children
    for prober in reversed(probers):
        free.put(prober)

    def probed(row: dict) -> VideoFacts:
        prober = free.get()
        try:
            return prober.facts(row)
        finally:
            free.put(prober)

    with ThreadPoolExecutor(len(probers), thread_name_prefix="probe") as pool:
        try:
            for row in rows:
                waiting.append(_declared(row) if _is_declared(row) else pool.submit(probed, row))
                if len(waiting) > len(probers) * AHEAD_PER_PROBER:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for prober in probers:
                prober.close()


def _result(facts: VideoFacts | Future[VideoFacts]) -> VideoFacts:
    return facts if isinstance(facts, VideoFacts) else facts.result()


def _is_declared(row: dict) -> bool:
    return bool(row["digest"] and row["num_frames"] and row["fps"])


def _declared(row: dict) -> VideoFacts:
    num_frames, fps = row["num_frames"], row["fps"]
    pts_s = regular_pts_s(num_frames, fps)
    return _facts(row, video_id=row["digest"], pts_s=pts_s, end_s=num_frames / fps, fps=fps, is_regular=True)


@lru_cache(maxsize=64)
def regular_pts_s(num_frames: int, fps: float) -> np.ndarray:
    """The times of `num_frames` frames at a constant rate, the first at 0."""
    return np.arange(num_frames) / fps


def serve_facts(options: Mapping[str, Mapping[str, Any]]) -> Serve:
    """In the prober's process: the function that it runs."""
    apply_storage_options(options)
    return probe_row


def probe_row(row: dict) -> Iterator[Identity | VideoFacts]:
    """Fetch, name and probe the video of one row: its identity when it is about to be opened, then its facts."""
    digest, size_bytes = row["digest"], row["size_bytes"]
    try:
        with local_file(row["uri"]) as path:
            if not digest:
                with open(path, "rb") as stream:
                    digest, size_bytes = digest_of_stream(stream)
            yield Identity(video_id=digest, size_bytes=-1 if size_bytes is None else size_bytes)
            probe = probe_video(path)
    except StorageError:
        raise  # our own disk, not the video
    except (TokenmillError, OSError) as error:
        known = digest or f"uri:{digest_of(row['uri'])}"
        yield _facts(row, video_id=known, size_bytes=size_bytes, reason=str(error))
        return
    yield _facts(
        row,
        video_id=digest,
        size_bytes=size_bytes,
        pts_s=probe.pts_s,
        end_s=probe.end_s,
        fps=probe.fps,
        width=probe.width,
        height=probe.height,
        codec=probe.codec,
    )


def _facts(row: dict, *, video_id: str, **known: object) -> VideoFacts:
    values = {
        "size_bytes": row["size_bytes"],
        "pts_s": None,
        "is_regular": False,
        "end_s": 0.0,
        "fps": row["fps"],
        "width": row["width"],
        "height": row["height"],
        "codec": None,
        "reason": None,
    } | known
    if values["size_bytes"] is None:
        values["size_bytes"] = -1
    return VideoFacts(
        uri=row["uri"],
        stamp=row["stamp"],
        video_id=video_id,
        caption=row["caption"],
        metadata=row["metadata"],
        **values,  # pyright: ignore[reportArgumentType]
    )
