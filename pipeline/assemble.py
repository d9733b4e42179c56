"""Assembling: frames in the order shown -> the clips that want them, each frame resized once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..schemas.clip import Clip, ClipFailure, ClipFrames, Sampling
from .probe import VideoProbe
from .resize import resize_frame

# Reads the wanted frames (rising) of a video: for each its pixels (H,W,3) uint8 RGB, or why there are none.
ReadFrames = Callable[[str, VideoProbe, Sequence[int]], Iterator[tuple[int, np.ndarray | str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipWant:
    """A clip, and for each of its times which frame of the video is nearest, and whether a decoder can start there."""

    clip: Clip
    frames: tuple[int, ...]
    is_key_frame: tuple[bool, ...] = ()


def wanted_frames(wants: Iterable[ClipWant]) -> list[int]:
    """Every frame that any of the clips wants, once, in the order shown."""
    return sorted({index for want in wants for index in want.frames})


def assemble(
    wants: Sequence[ClipWant],
    frames: Iterable[tuple[int, np.ndarray | str]],
    pts_s: np.ndarray,
    sampling: Sampling,
    decoder: str,
) -> Iterator[ClipFrames | ClipFailure]:
    """Each clip as soon as its last frame has come, or fails for want of one.

    `frames` gives the wanted frames of the video in the order shown, shown at `pts_s`. Pixels are held for
    clips that have begun and are not complete, nothing else.
    """
    takers: dict[int, list[tuple[_Draft, int]]] = {}
    for want in wants:
        draft = _Draft(want, sampling)
        for position, index in enumerate(want.frames):
            takers.setdefault(index, []).append((draft, position))
    for index, pixels_HWC in frames:
        open_takers = [(draft, position) for draft, position in takers.pop(index) if draft.num_missing]
        if isinstance(pixels_HWC, str):
            reason = f"the frame at {pts_s[index]:.3f} s cannot be read: {pixels_HWC}"
            for draft in dict.fromkeys(draft for draft, _ in open_takers):
                yield draft.failed(reason)
        elif open_takers:
            resized_HWC = resize_frame(pixels_HWC, sampling)
            for draft, position in open_takers:
                draft.put(position, resized_HWC)
                if not draft.num_missing:
                    yield draft.finished(pts_s, decoder)


class _Draft:
    """A clip that waits for frames."""

    def __init__(self, want: ClipWant, sampling: Sampling) -> None:
        self._want, self._sampling = want, sampling
        self._frames_THWC: np.ndarray | None = None
        self.num_missing = len(want.frames)

    def put(self, position: int, frame_HWC: np.ndarray) -> None:
        if self._frames_THWC is None:
            self._frames_THWC = np.empty((self._sampling.num_frames, *frame_HWC.shape), np.uint8)
        self._frames_THWC[position] = frame_HWC
        self.num_missing -= 1

    def finished(self, pts_s: np.ndarray, decoder: str) -> ClipFrames:
        frames_THWC, self._frames_THWC = self._frames_THWC, None
        assert frames_THWC is not None
        num_valid = len(self._want.frames)
        frames_THWC[num_valid:] = frames_THWC[num_valid - 1]
        decoded_pts_s = tuple(pts_s[list(self._want.frames)].tolist())
        return ClipFrames(
            clip=self._want.clip,
            frames_THWC=frames_THWC,
            decoded_pts_s=decoded_pts_s,
            frame_numbers=self._want.frames,
            decoder=decoder,
            is_key_frame=self._want.is_key_frame,
        )

    def failed(self, reason: str) -> ClipFailure:
        self._frames_THWC, self.num_missing = None, 0
        return ClipFailure(clip_id=self._want.clip.clip_id, step="decode", reason=reason)
