"""Candidate frames: those of a clip that queries can ask for, their scores without a query, and their embeddings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..schemas.clip import ClipFrames, Sampling
from ..schemas.errors import TokenizerError
from .frame_scores import score_frames
from .relevance import FrameEncoder

FrameRows = list[dict[str, Any]]  # the candidate frames of a clip, as schemas.tables.FRAME_TYPE

SAME_TIME_S = 1e-6
FRAMES_REVISION = 1  # rises with every change of this file that changes which frames are candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedFrames:
    """The candidate frames of a clip (their places in it, and times) with their embeddings (K,D) float16."""

    frames: tuple[int, ...]
    pts_s: tuple[float, ...]
    embeddings_KD: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameEmbedder:
    """An encoder and the one number of frames that it is run on: sums of floating-point numbers depend on it."""

    encoder: FrameEncoder
    batch_size: int

    def embed(self, clips: Sequence[ClipFrames], chosen: Sequence[Sequence[int]]) -> list[EmbeddedFrames]:
        """The embeddings of the `chosen` frames of each clip; TokenizerError where one is not a number."""
        frames_NHWC = np.concatenate([one.frames_THWC[list(k)] for one, k in zip(clips, chosen, strict=True)])
        ends = np.cumsum([len(k) for k in chosen])[:-1]
        embedded = np.split(np.concatenate(list(self._batches(frames_NHWC))), ends)
        if not all(np.isfinite(values_KD).all() for values_KD in embedded):
            raise TokenizerError(
                f"{self.encoder.spec.name} gives embeddings that are not numbers: set dtype to float32, or check its"
                f" weights"
            )
        return [
            EmbeddedFrames(
                frames=tuple(k),
                pts_s=tuple(one.decoded_pts_s[i] for i in k),
                embeddings_KD=values_KD.astype("<f2"),
            )
            for one, k, values_KD in zip(clips, chosen, embedded, strict=True)
        ]

    def _batches(self, frames_NHWC: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(frames_NHWC), self.batch_size):
            batch_NHWC = frames_NHWC[start : start + self.batch_size]
            missing = self.batch_size - len(batch_NHWC)
            filled_NHWC = np.concatenate((batch_NHWC, np.zeros((missing, *batch_NHWC.shape[1:]), np.uint8)))
            yield self.encoder.embed_frames(filled_NHWC)[: len(batch_NHWC)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMaker:
    """Which frames of clips are candidates (`fps` a second, or all where it is None), and how they are embedded.

    `embedders` are by product.
    """

    sampling: Sampling
    fps: float | None
    embedders: Mapping[str, FrameEmbedder] = field(default_factory=dict)

    def candidates(self, one: ClipFrames) -> list[int]:
        """The places of the candidate frames among the real frames of a clip."""
        return candidates_of(one.decoded_pts_s, one.frame_numbers[0], one.clip.start_s, self.fps)

    def describe(self, one: ClipFrames) -> FrameRows:
        """What is stored of each candidate frame of a clip."""
        scores = score_frames(one.frames_THWC[: one.clip.num_valid])
        return [
            {
                "frame": i,
                "frame_number": one.frame_numbers[i],
                "pts_s": one.decoded_pts_s[i],
                "is_key_frame": i < len(one.is_key_frame) and one.is_key_frame[i],
                "motion": scores.motion[i],
                "novelty": scores.novelty[i],
                "sharpness": scores.sharpness[i],
                "shot_change": scores.shot_change[i],
                "is_shot_start": scores.is_shot_start[i],
            }
            for i in self.candidates(one)
        ]


def candidates_of(pts_s: Sequence[float], first_number: int, start_s: float, fps: float | None) -> list[int]:
    """The places of the candidates among frames at rising times `pts_s`: all where `fps` is None.

    The grid has a time every 1/fps seconds from 0, in all clips of a video the same; the first frame at or after each
    is a candidate, in the clip that holds it. A clip without such a frame has its first one. `first_number` is that of
    the first frame in its video, `start_s` the start of the clip.
    """
    if fps is None:
        return list(range(len(pts_s)))
    cells = [math.floor(time_s * fps + SAME_TIME_S) for time_s in pts_s]
    found = [i for i in range(1, len(cells)) if cells[i] > cells[i - 1]]
    is_first_in_cell = first_number == 0 or cells[0] / fps >= start_s - SAME_TIME_S
    return [0, *found] if is_first_in_cell or not found else found
