"""What is known of each listed video: from the source's own columns, or by reading and probing it."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ..schemas.digest import digest_of, digest_of_stream
from ..schemas.errors import StorageError, TokenmillError
from .fetch import local_file
from .probe import probe_video

AHEAD_PER_THREAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """One listed video: its identity, and the times of its frames or the reason why there are none.

    `is_regular` says that the times are not known but follow from the frame rate that the source declares.
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


def read_facts(listing: pa.Table, num_threads: int) -> Iterator[VideoFacts]:
    """The facts of every row of `listing` (SOURCE_SCHEMA), in its order, reading only what the row leaves open."""
    rows = (row for batch in listing.to_batches(max_chunksize=4096) for row in batch.to_pylist())
    waiting: deque[VideoFacts | Future[VideoFacts]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="probe") as pool:
        for row in rows:
            waiting.append(_declared(row) if _is_declared(row) else pool.submit(_probed, row))
            if len(waiting) > num_threads * AHEAD_PER_THREAD:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


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


def _probed(row: dict) -> VideoFacts:
    digest, size_bytes = row["digest"], row["size_bytes"]
    try:
        with local_file(row["uri"]) as path:
            if not digest:
                with open(path, "rb") as stream:
                    digest, size_bytes = digest_of_stream(stream)
            probe = probe_video(path)
    except StorageError:
        raise  # our own disk, not the video
    except (TokenmillError, OSError) as error:
        return _facts(row, video_id=digest or f"uri:{digest_of(row['uri'])}", size_bytes=size_bytes, reason=str(error))
    return _facts(
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
