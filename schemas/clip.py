"""Videos, clips, and the frames of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ResizeMode = Literal["center_crop", "squash", "letterbox"]
Interpolation = Literal["bilinear", "bicubic"]
Tail = Literal["pad", "drop"]
FailureStatus = Literal["failed", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One source file, known by its content.

    `digest` is the SHA-256 of the bytes (64 hex digits), or ``uri:`` and a SHA-256 of the URI where the
    source says that a URI never changes its content. `size_bytes` is -1 where nobody has looked.
    """

    uri: str
    size_bytes: int
    digest: str

    def __post_init__(self) -> None:
        if not self.uri or not self.digest:
            raise ValueError(f"a video needs a uri and a digest, found {self.uri=} {self.digest=}")

    @property
    def has_content_digest(self) -> bool:
        """Whether `digest` names the bytes (and can be checked) rather than the URI."""
        return not self.digest.startswith("uri:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which frames of a video make a clip, and at what size.

    `fps` None means every frame of the video. `resize` is ``<mode>/<interpolation>``, for instance
    ``center_crop/bilinear``; it is always antialiased.
    """

    fps: float | None
    num_frames: int
    height: int
    width: int
    resize: str
    tail: Tail

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.height < 1 or self.width < 1:
            raise ValueError(f"sizes must be positive: {self.num_frames=} {self.height=} {self.width=}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"a frame rate must be positive: {self.fps=}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A half-open span [start_s, end_s) of a video, sampled at the times `frame_pts_s`.

    `frame_pts_s` holds one presentation time in seconds for every valid frame, never falling. A clip with
    fewer times than the sampling's `num_frames` is padded by repeating its last frame.
    """

    clip_id: str
    video: Video
    start_s: float
    end_s: float
    frame_pts_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.frame_pts_s:
            raise ValueError(f"clip {self.clip_id} has no frames")
        if not self.end_s > self.start_s:
            raise ValueError(f"clip {self.clip_id} is empty: {self.start_s=} {self.end_s=}")

    @property
    def num_valid(self) -> int:
        """How many frames are real; the rest of the clip is padding."""
        return len(self.frame_pts_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFrames:
    """One decoded clip: `frames_THWC` uint8 RGB, padded to the sampling's length.

    `decoder` is the name and version of the decoder that the video was routed to. `decoded_pts_s` are the presentation
    times of the valid frames as the decoder found them, `frame_numbers` their places in the video, from 0 in the order
    shown, `is_key_frame` whether a decoder can start at them (empty where nobody says).
    """

    clip: Clip
    frames_THWC: np.ndarray
    decoded_pts_s: tuple[float, ...]
    frame_numbers: tuple[int, ...]
    decoder: str
    is_key_frame: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.frames_THWC.dtype != np.uint8 or self.frames_THWC.ndim != 4 or self.frames_THWC.shape[3] != 3:
            raise ValueError(f"frames must be (T,H,W,3) uint8: {self.frames_THWC.dtype} {self.frames_THWC.shape}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBatch:
    """Clips of one size together: `frames_BTHWC` uint8 RGB, and how many frames of each are real."""

    clips: tuple[Clip, ...]
    frames_BTHWC: np.ndarray
    num_valid_B: tuple[int, ...]

    def __post_init__(self) -> None:
        frames = self.frames_BTHWC
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[4] != 3:
            raise ValueError(f"frames must be (B,T,H,W,3) uint8, found {frames.dtype} {frames.shape}")
        if not len(self.clips) == len(self.num_valid_B) == frames.shape[0]:
            raise ValueError(f"{len(self.clips)} clips, {len(self.num_valid_B)} lengths, {frames.shape[0]} rows")

    @classmethod
    def stack(cls, decoded: Sequence[ClipFrames]) -> "FrameBatch":
        """The batch of clips that were decoded one by one."""
        return cls(
            clips=tuple(one.clip for one in decoded),
            frames_BTHWC=np.stack([one.frames_THWC for one in decoded]),
            num_valid_B=tuple(one.clip.num_valid for one in decoded),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFailure:
    """A clip that could not be made, the step that failed (``fetch``, ``decode``) and why.

    ``quarantined`` clips are of a video that killed, outlasted or outgrew its decoder: `attempts` times, and
    `log_tail` is the last that the decoder wrote to its standard error.
    """

    clip_id: str
    step: str
    reason: str
    status: FailureStatus = "failed"
    attempts: int = 1
    log_tail: str = ""
