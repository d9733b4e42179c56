"""Decoders of a worker: each turns the clips of one video after the other into frames, side by side."""

import contextlib
import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..schemas.clip import Clip, ClipFailure, ClipFrames, Sampling
from .decode import FrameDecoder
from .decode_clips import decode_clips
from .isolation import Child, Poison, Serve, stream_with_strikes
from .prefetch import ReadAhead

DECODE_AHEAD_BYTES = 256 << 20
SLOWEST_PER_VIDEO_S = 4.0  # a decoder may always take so many seconds for a second of video


class ClipDecoder(Protocol):
    """Turns clips into frames, from wherever their video is stored."""

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """One value for each of the `clips`, which are of one video, as they become complete."""
        ...

    def close(self) -> None:
        """Stop, also in the middle of a video: `decode` ends or raises in the thread that is in it."""
        ...


class DirectDecoder:
    """Decodes where it is called, in no other process: for tests, and for what only this process can see."""

    def __init__(self, decoder: FrameDecoder) -> None:
        self._decoder = decoder

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        return (result for result in decode_clips(clips, self._decoder) if result is not None)

    def close(self) -> None:
        pass


class IsolatedDecoder:
    """Decodes in a child process. A video that kills, outlasts or outgrows it twice is quarantined.

    `make_serve` gives the child a function from clips to what `decode_clips` yields.
    """

    def __init__(self, make_serve: Callable[[], Serve], sampling: Sampling, timeout_s: float, memory_mb: int) -> None:
        self._child = Child(make_serve, memory_mb)
        self._sampling, self._timeout_s = sampling, timeout_s

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """One value for each of the `clips`; those that came out before the video became poison are kept."""
        waiting = {clip.clip_id: clip for clip in clips}
        span_s = max(clip.end_s for clip in clips) - min(clip.start_s for clip in clips)
        limit_s = max(self._timeout_s, SLOWEST_PER_VIDEO_S * span_s)
        try:
            results = stream_with_strikes(self._child, clips[0].video.uri, lambda: tuple(waiting.values()))
            with contextlib.closing(results):
                for result in results:
                    if result is None:
                        self._child.allow_s(limit_s)  # the download before it has time limits of its own
                        continue
                    self._check(result, waiting)
                    yield result
            if waiting:
                raise Poison(f"garbage: the decoder left out {len(waiting)} clips", 1, "")
        except Poison as poison:
            for clip_id in waiting:
                yield ClipFailure(
                    clip_id=clip_id,
                    step="decode",
                    reason=poison.reason,
                    status="quarantined",
                    attempts=poison.attempts,
                    log_tail=poison.log_tail,
                )

    def close(self) -> None:
        self._child.close()

    def _check(self, result: ClipFrames | ClipFailure, waiting: dict[str, Clip]) -> None:
        """Take a result for the clip that waits for it; Poison where it is not what was asked for."""
        clip_id = result.clip_id if isinstance(result, ClipFailure) else result.clip.clip_id
        if clip_id not in waiting:
            raise Poison(f"garbage: the decoder gave clip {clip_id[:12]}, which was not asked for", 1, "")
        s = self._sampling
        if isinstance(result, ClipFrames) and result.frames_THWC.shape != (s.num_frames, s.height, s.width, 3):
            raise Poison(f"garbage: the decoder gave frames of shape {result.frames_THWC.shape}", 1, "")
        del waiting[clip_id]


def decode_ahead(clips: Sequence[Clip], decoders: Sequence[ClipDecoder]) -> ReadAhead[ClipFrames | ClipFailure]:
    """Frames or a failure for every clip, in the order in which they come; each video is opened once."""
    videos: queue.SimpleQueue[list[Clip]] = queue.SimpleQueue()
    for _, group in itertools.groupby(clips, key=lambda clip: clip.video):
        videos.put(list(group))

    def results_of(decoder: ClipDecoder) -> Iterator[ClipFrames | ClipFailure]:
        while True:
            try:
                group = videos.get_nowait()
            except queue.Empty:
                return
            yield from decoder.decode(group)

    def interrupt() -> None:
        for decoder in decoders:
            decoder.close()

    return ReadAhead([results_of(decoder) for decoder in decoders], _num_bytes, DECODE_AHEAD_BYTES, interrupt)


def _num_bytes(result: ClipFrames | ClipFailure) -> int:
    return result.frames_THWC.nbytes if isinstance(result, ClipFrames) else 0
