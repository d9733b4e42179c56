"""Key frames: where the segments of a clip are looked for afresh, at shot changes and every few frames in between."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

THUMBNAIL = 64  # pixels of the side of the squares that frames are compared on
LAYOUT = 16  # of the side of those that tell where colours are
BINS = 8  # of each colour in histograms
CUT_CHANGE = 0.18  # from one frame to the next: from there on it can be a cut between shots
WINDOW = 2  # frames before and after a change that it must stand out from
STANDS_OUT = 1.5  # times the median change of those
CERTAIN = 2.0  # times the change of a cut: one that need not stand out

Look = tuple[torch.Tensor, torch.Tensor]  # shares of colours, and the layout as a small picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Frames `first` to `last` (both in it), which are followed from their key frame `first`.

    Where `is_linked`, `first` is also the last frame of the chunk before it; otherwise a shot begins there.
    """

    first: int
    last: int
    is_linked: bool


def chunks_of(frames_THWC: np.ndarray, key_every: int, cut_change: float) -> list[Chunk]:
    """The chunks of a clip of uint8 RGB frames: every frame is in one, those at links are in two.

    A shot has a key frame at its first frame and every `key_every` frames after it, but not at its last frame, where
    nothing would follow.
    """
    num_frames = len(frames_THWC)
    cuts = cuts_among(changes_of(frames_THWC), cut_change)
    chunks = []
    for start, end in zip([0, *cuts], [*cuts, num_frames], strict=True):
        keys = [start, *range(start + key_every, end - 1, key_every)]
        for first, last in zip(keys, [*keys[1:], end - 1], strict=True):
            chunks.append(Chunk(first=first, last=last, is_linked=first > start))
    return chunks


def changes_of(frames_THWC: np.ndarray) -> np.ndarray:
    """How much (T,) each frame differs from the one before it, from 0 to 1; 0 for the first.

    The geometric mean of two differences, so that both must be large: of colours wherever they are (half of the
    absolute differences of the histograms), which movement changes little, and of the layout (mean absolute difference
    of small pictures), which slow fades of light change little.
    """
    return changes_between([look_of(frame_HWC) for frame_HWC in frames_THWC])


def changes_between(looks_T: Sequence[Look]) -> np.ndarray:
    """`changes_of` frames that look so."""
    return np.array(
        [0.0, *(change_between(now, before) for before, now in itertools.pairwise(looks_T))][: len(looks_T)]
    )


def change_between(one: Look, other: Look) -> float:
    """How much two looks differ, from 0 to 1, as `changes_of`."""
    colours = float((one[0] - other[0]).abs().sum()) / 2
    layout = float((one[1] - other[1]).abs().mean())
    return (colours * layout) ** 0.5


def mean_look(looks: Sequence[Look]) -> Look:
    """The look that is nearest to all of them."""
    colours, layouts = zip(*looks, strict=True)
    return torch.stack(colours).mean(0), torch.stack(layouts).mean(0)


def cuts_among(changes_T: np.ndarray, cut_change: float) -> list[int]:
    """The frames at which shots begin, but for the first: changes of `cut_change` or more that stand out.

    A change stands out where it is 1.5 times the median of those of the two frames before and after it: fast movement
    changes every frame, a cut one. From twice `cut_change` on it need not.
    """
    cuts = []
    for t in range(1, len(changes_T)):
        near = [changes_T[i] for i in range(max(1, t - WINDOW), min(len(changes_T), t + WINDOW + 1)) if i != t]
        usual = float(np.median(near)) if near else 0.0
        if changes_T[t] >= min(CERTAIN * cut_change, max(cut_change, STANDS_OUT * usual)):
            cuts.append(t)
    return cuts


def look_of(frame_HWC: np.ndarray) -> Look:
    """Shares of the colours of a frame, and the frame as a small picture with values from 0 to 1."""
    frame_1CHW = torch.tensor(np.ascontiguousarray(frame_HWC)).permute(2, 0, 1)[None]
    small_1Chw = functional.interpolate(frame_1CHW.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    red, green, blue = (small_1Chw[0].long() * BINS // 256).flatten(1)
    counts = torch.bincount((red * BINS + green) * BINS + blue, minlength=BINS**3)
    layout = functional.avg_pool2d(small_1Chw, THUMBNAIL // LAYOUT)
    return counts.float() / THUMBNAIL**2, layout / 255
