"""How much frames matter to a text: the product of their embeddings, and where in a clip it is large."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..schemas.cache_info import CacheInfo
from ..schemas.errors import CacheError
from ..schemas.relevance import Calibration, ScorerSpec
from ..schemas.shard import TOKENS

CODED = "pyratok/pyramid"  # whose codes are embeddings of frames, bit by bit
ALIKE = 5e-3  # scores of a video with a smaller standard deviation do not differ: its frames are all alike
WINDOW_FRAMES = 25  # that a score is smoothed over (PyraTok, arXiv:2601.16210)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "grey": (128,) * 3}


@runtime_checkable
class FrameScorer(Protocol):
    """Says how much frames matter to a text by looking at both together. Holds the weights, if it has any."""

    @property
    def spec(self) -> ScorerSpec:
        """What decides the scores, apart from frames and texts; `dim` is None."""
        ...

    def score(self, frames_NHWC: np.ndarray, text: str) -> np.ndarray:
        """Raw scores (N,) float32 of uint8 RGB frames of one size, higher where a frame matters more."""
        ...


@runtime_checkable
class FrameEncoder(Protocol):
    """Brings frames and texts into one space, so that frames are scored for texts that come later: by their cosine."""

    @property
    def spec(self) -> ScorerSpec:
        """What decides the embeddings, apart from frames and texts."""
        ...

    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 embeddings (N,D) of length 1 of uint8 RGB frames of one size."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 embeddings (N,D) of length 1; TokenizerError where it takes no texts."""
        ...


def relevance(frames_TD: np.ndarray, text_D: np.ndarray) -> np.ndarray:
    """How much each frame matters to a text (T,): the cosine of their embeddings, which have length 1."""
    return frames_TD @ text_D


def calibrated(raw_N: np.ndarray, videos_N: np.ndarray, calibration: Calibration) -> np.ndarray:
    """float64 p (N,) in (0,1) of raw scores of frames for one text; `videos_N` says which are of the same video."""
    raw_N = np.asarray(raw_N, np.float64)
    if calibration.rule == "standardized":
        raw_N = standardized(raw_N, videos_N)
    return 1 / (1 + np.exp(-(calibration.scale * raw_N + calibration.bias)))


def standardized(raw_N: np.ndarray, videos_N: np.ndarray) -> np.ndarray:
    """How far scores (N,) are from the mean of their video, in its standard deviations; 0 where all are alike."""
    _, video_N = np.unique(videos_N, return_inverse=True)
    counts = np.bincount(video_N)
    apart_N = raw_N - (np.bincount(video_N, raw_N) / counts)[video_N]
    deviations_N = np.sqrt(np.bincount(video_N, apart_N**2) / counts)[video_N]
    return np.divide(apart_N, deviations_N, out=np.zeros_like(apart_N), where=deviations_N > ALIKE)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEncoder:
    """An encoder whose embeddings of frames a cache has: those of `frames/<name>`, or those that the bits of the codes
    of `tokens/<name>` are (PyraTok).

    `version` is the fingerprint of the product, `section` what the recipe says of it.
    """

    name: str
    product: str
    version: str
    spec: Mapping[str, Any]
    section: Mapping[str, Any]

    @property
    def calibration(self) -> Calibration:
        """How its scores become p: as the recipe says, or in its own way."""
        return Calibration(**(self.section.get("calibration") or self.spec["calibration"]))

    @property
    def has_embeddings(self) -> bool:
        """Whether its embeddings are stored, and not in codes."""
        return not self.product.startswith(TOKENS)


def encoders_of(info: CacheInfo) -> dict[str, KnownEncoder]:
    """The encoders of a cache by name, those whose embeddings are stored first."""
    found: dict[str, KnownEncoder] = {}
    for product, entry in info.products.items():
        name, section = product.partition("/")[2], entry.section or {}
        if entry.encoder:
            found[name] = KnownEncoder(
                name=name, product=product, version=entry.fingerprint, spec=entry.encoder, section=section
            )
    for product, entry in info.products.items():
        name, tokenizer = product.partition("/")[2], entry.tokenizer or {}
        if tokenizer.get("name") == CODED and name not in found:
            spec = ScorerSpec(
                name="pyratok",
                dim=(tokenizer["codebook_size"] - 1).bit_length(),
                weights_sha256=tokenizer["weights_sha256"],
            )
            found[name] = KnownEncoder(
                name=name,
                product=product,
                version=entry.fingerprint,
                spec=plain_spec(spec),
                section=entry.section or {},
            )
    return found


def plain_spec(spec: ScorerSpec) -> dict[str, Any]:
    """A spec as JSON has it."""
    return json.loads(json.dumps(asdict(spec)))


def check_same_encoder(encoder: FrameEncoder, known: KnownEncoder, cache: str) -> None:
    """CacheError unless this encoder, with these weights, made the embeddings."""
    here = plain_spec(encoder.spec)
    others = [
        f"{key} {known.spec.get(key)} there, {value} here"
        for key, value in here.items()
        if key != "calibration" and known.spec.get(key) != value
    ]
    if others:
        raise CacheError(
            f"{cache}: {known.product} was made by another encoder than is here ({'; '.join(others)}): put its weights"
            f" back, or run the recipe again"
        )


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


class FakeEncoder:
    """Knows colours: the mean colour of a frame, and that of the COLOURS that a text names."""

    spec = ScorerSpec(name="fake", dim=3, weights_sha256=None)

    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        return unit(frames_NHWC.mean((1, 2)) - 64)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        named = [[COLOURS[word] for word in text.lower().split() if word in COLOURS] for text in texts]
        return unit(np.array([np.mean(colours, 0) - 64 if colours else np.zeros(3) for colours in named]))
