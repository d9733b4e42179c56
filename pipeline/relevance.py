"""How much frames matter to a text: the product of their embeddings, and where in a clip it is large."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..schemas.relevance import ScorerSpec

WINDOW_FRAMES = 25  # that a score is smoothed over (PyraTok, arXiv:2601.16210)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "grey": (128,) * 3}


class FrameScorer(Protocol):
    """Brings frames and texts into one space, so that frames can be scored for texts that come later."""

    @property
    def spec(self) -> ScorerSpec:
        """What decides the embeddings, apart from frames and texts."""
        ...

    def embed_frames(self, frames_THWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (T,D) of length 1 of the uint8 RGB frames of a clip."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,D) of length 1."""
        ...


def relevance(frames_TD: np.ndarray, text_D: np.ndarray) -> np.ndarray:
    """How much each frame matters to a text (T,): the cosine of their embeddings, which have length 1."""
    return frames_TD @ text_D


def smoothed(scores_T: np.ndarray, window: int = WINDOW_FRAMES) -> np.ndarray:
    """The mean of the scores in a window around each frame, of those that there are; ValueError for an even window."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a window has its frame in the middle, so an odd number of frames: {window=}")
    sums = np.convolve(scores_T.astype(np.float64), np.ones(window), "full")
    counts = np.convolve(np.ones(len(scores_T)), np.ones(window), "full")
    inside = slice(window // 2, window // 2 + len(scores_T))
    return sums[inside] / counts[inside]


def best_span(scores_T: np.ndarray, threshold: float) -> tuple[int, int] | None:
    """The half-open range of frames, all at `threshold` or above, that has the highest mean; None without any.

    Of equal ones it is the longest, and of these the first.
    """
    is_in = np.concatenate(([False], scores_T >= threshold, [False]))
    begins, ends = np.flatnonzero(is_in[1:] & ~is_in[:-1]), np.flatnonzero(is_in[:-1] & ~is_in[1:])
    spans = [(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True)]
    return max(spans, key=lambda span: (scores_T[slice(*span)].mean(), span[1] - span[0], -span[0]), default=None)


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors (N,D) brought to length 1, float32; those of no length stay so."""
    vectors_ND = np.asarray(vectors_ND, np.float64)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return (vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1)).astype(np.float32)


class FakeScorer:
    """Knows colours: the mean colour of a frame, and that of the COLOURS that a text names."""

    spec = ScorerSpec(name="fake", dim=3, weights_sha256=None)

    def embed_frames(self, frames_THWC: np.ndarray) -> np.ndarray:
        return unit(frames_THWC.mean((1, 2)) - 64)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        named = [[COLOURS[word] for word in text.lower().split() if word in COLOURS] for text in texts]
        return unit(np.array([np.mean(colours, 0) - 64 if colours else np.zeros(3) for colours in named]))
