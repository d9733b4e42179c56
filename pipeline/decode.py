"""Decoding: the clips of one video -> their frames at the sampling's size, or a failure for each."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch

from ..schemas.clip import Clip, ClipFailure, ClipFrames, Sampling
from ..schemas.errors import DecodeError
from .assemble import ClipWant, ReadFrames, assemble, wanted_frames
from .cut import nearest
from .decode_decord import DECORD, read_with_decord
from .decode_pyav import PYAV, read_with_pyav
from .probe import VideoProbe, probe_video
from .resize import RESIZE_REVISION, parse_resize

DecoderChoice = Literal["auto", "decord", "pyav"]
READERS: Mapping[str, tuple[str, ReadFrames]] = {"decord": (DECORD, read_with_decord), "pyav": (PYAV, read_with_pyav)}
KEPT_PROBES = 4  # a long video is in many shards, and those follow one another


class FrameDecoder(Protocol):
    """Turns clips into frames."""

    @property
    def identity(self) -> str:
        """All that decides pixels apart from video and sampling; part of every product's fingerprint."""
        ...

    def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """One value for each of the `clips` of the video at `path`, as they become complete."""
        ...


class VideoDecoder:
    """Reads each needed frame once, in the order shown, and holds the frames of unfinished clips only.

    ``auto`` takes decord and, where that cannot or errs, PyAV for the clips still unfinished.
    """

    def __init__(self, sampling: Sampling, decoder: DecoderChoice) -> None:
        parse_resize(sampling.resize)
        self._sampling, self._choice = sampling, decoder

    @property
    def identity(self) -> str:
        # torch's bilinear is in integers; its bicubic is in floating point, and follows its version.
        torch_version = f" torch-{torch.__version__}" if self._sampling.resize.endswith("bicubic") else ""
        return f"{self._choice} {DECORD} {PYAV} resize-{RESIZE_REVISION}{torch_version}"

    def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """One value for each of the `clips` of the video at `path`, as they become complete.

        A clip fails where the file or a frame of it cannot be read, or has no frame near a wanted time.
        """
        try:
            probe = _probe(path)
        except (DecodeError, OSError) as error:
            yield from (_failure(clip, str(error)) for clip in clips)
            return
        waiting: dict[str, ClipWant] = {}
        for clip in clips:
            try:
                waiting[clip.clip_id] = self._want(clip, probe)
            except DecodeError as error:
                yield _failure(clip, str(error))
        reasons, readers = [], self._readers(probe)
        # Rows name the decoder that the video was routed to, the same in every run: how far decord comes before
        # damage stops it depends on its threads, and PyAV goes on with the same 8-bit pixels.
        decoder = READERS[readers[0]][0]
        for name in readers:
            if not waiting:
                return
            _, read = READERS[name]
            wants = list(waiting.values())
            frames = read(path, probe, wanted_frames(wants))
            try:
                for result in assemble(wants, frames, probe.pts_s, self._sampling, decoder):
                    del waiting[result.clip_id if isinstance(result, ClipFailure) else result.clip.clip_id]
                    yield result
            except DecodeError as error:
                reasons.append(str(error))
        yield from (_failure(want.clip, "; ".join(reasons)) for want in waiting.values())

    def _readers(self, probe: VideoProbe) -> tuple[str, ...]:
        if self._choice != "auto":
            return (self._choice,)
        return ("decord", "pyav") if probe.decoder == "decord" else ("pyav",)

    def _want(self, clip: Clip, probe: VideoProbe) -> ClipWant:
        if clip.num_valid > self._sampling.num_frames:
            raise ValueError(f"clip {clip.clip_id} has {clip.num_valid} times, {self._sampling.num_frames=}")
        times_s, start_s = np.array(clip.frame_pts_s), float(probe.pts_s[0])
        for time_s in (times_s.min(), times_s.max()):
            if not start_s - probe.frame_interval_s <= time_s <= probe.end_s + probe.frame_interval_s:
                raise DecodeError(
                    f"the clip asks for a frame at {time_s:.3f} s, the video shows {len(probe.pts_s)} frames from"
                    f" {start_s:.3f} to {probe.end_s:.3f} s: the table that listed it is wrong about its length,"
                    f" rate or start; without those columns the file itself is asked"
                )
        frames_T = nearest(probe.pts_s, times_s)
        is_key_frame = tuple(np.isin(frames_T, probe.key_frames_K).tolist())
        return ClipWant(clip=clip, frames=tuple(frames_T.tolist()), is_key_frame=is_key_frame)


def _probe(path: str) -> VideoProbe:
    stat = os.stat(path)
    return _probe_once(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=KEPT_PROBES)
def _probe_once(path: str, *_unchanged: int) -> VideoProbe:
    return probe_video(path)


def _failure(clip: Clip, reason: str) -> ClipFailure:
    return ClipFailure(clip_id=clip.clip_id, step="decode", reason=reason)


class FakeDecoder:
    """Frames made of nothing but the clip's times: a slanting ramp that moves by a grey level a millisecond."""

    identity = "fake"

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def decode(self, path: str, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        """Frames for each of the `clips`; `path` is not opened."""
        for clip in clips:
            times_s = np.array(clip.frame_pts_s + clip.frame_pts_s[-1:] * (self._sampling.num_frames - clip.num_valid))
            shift_T = np.round(times_s * 1000).astype(np.int64)
            ramp_HWC = sum(np.ogrid[: self._sampling.height, : self._sampling.width, :3])
            frames_THWC = (shift_T[:, None, None, None] + ramp_HWC).astype(np.uint8)
            yield ClipFrames(
                clip=clip,
                frames_THWC=frames_THWC,
                decoded_pts_s=clip.frame_pts_s,
                frame_numbers=tuple(range(clip.num_valid)),
                decoder=self.identity,
            )
