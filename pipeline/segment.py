"""Segmenting: the frames of a clip -> masks and trajectories, as trainers of TrajTok read them (spec section 5)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..schemas.clip import ClipFailure, ClipFrames, Sampling
from ..schemas.masks import MOST_IDS, ClipMasks, SegmenterSpec
from .linking import Edge, edge_of

# Rises with every change of this file that changes masks.
MASKS_REVISION = 1
COUNTED_TRACKS = 1 << 20  # track ids below it are counted as they are


class Segmenter(Protocol):
    """Turns frames into trajectories. Holds the weights, if it has any."""

    @property
    def spec(self) -> SegmenterSpec:
        """What decides the masks, apart from the frames."""
        ...

    def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
        """The tracks (T,H,W) of a clip, integers at the size of its frames, or why it has none.

        A track is the same number, 1 or more, in all frames of the clip where a trajectory is seen; 0 is no trajectory.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentedClip:
    """The masks of a clip, and its first and last real frames as the clips beside it are linked to them: there a
    track is 1 + the row of a trajectory.
    """

    masks: ClipMasks
    first: Edge
    last: Edge


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskMaker:
    """A segmenter, and how many trajectories of a clip are kept."""

    segmenter: Segmenter
    sampling: Sampling
    max_trajectories: int

    def make(self, one: ClipFrames) -> SegmentedClip | ClipFailure:
        """The masks of a clip, or why it has none."""
        tracks_THW = self.segmenter.segment(one)
        if isinstance(tracks_THW, ClipFailure):
            return tracks_THW
        num_valid = one.clip.num_valid
        masks = masks_of(tracks_THW, num_valid, self.max_trajectories)
        tracks = masks.tracks_THW
        first, last = (edge_of(one.frames_THWC[t], tracks[t]) for t in (0, num_valid - 1))
        return SegmentedClip(masks=masks, first=first, last=last)


class FakeSegmenter:
    """Two trajectories: what is brighter than the clip's mean, and what is not."""

    spec = SegmenterSpec(name="fake")

    def segment(self, one: ClipFrames) -> np.ndarray | ClipFailure:
        grey_THW = one.frames_THWC.astype(np.int32).sum(axis=3)
        return 1 + (grey_THW > grey_THW.mean()).astype(np.int32)


def masks_of(tracks_THW: np.ndarray, num_valid: int, most: int) -> ClipMasks:
    """The masks of the `most` largest tracks of a clip, those of its `num_valid` real frames counting.

    Where two segments touch, the pixels of the larger trajectory along the border are 0, and so is the first pixel of
    every frame. A frame keeps its MOST_IDS largest segments.
    """
    tracks = _by_area(_numbered(tracks_THW), num_valid, most)
    _open_borders(tracks)
    _limit_frames(tracks)
    tracks = _by_area(tracks, num_valid, most)
    num = int(tracks.max())
    masks_THW = np.empty(tracks.shape, np.uint8)
    graph_MT = np.zeros((num, len(tracks)), np.int64)
    for t, frame in enumerate(tracks):
        present = np.bincount(frame.ravel(), minlength=num + 1)[1:].nonzero()[0]
        ids = np.zeros(num + 1, np.uint8)
        ids[1 + present] = 1 + present if num <= MOST_IDS else np.arange(1, len(present) + 1)
        masks_THW[t], graph_MT[:, t] = ids[frame], ids[1:]
    return ClipMasks(masks_THW=masks_THW, graph_MT=graph_MT, num_valid=num_valid)


def _numbered(tracks_THW: np.ndarray) -> np.ndarray:
    """The same tracks, as numbers from 0 that are small enough to count by."""
    if 0 <= int(tracks_THW.min()) and int(tracks_THW.max()) < COUNTED_TRACKS:
        return tracks_THW
    positive = np.maximum(tracks_THW, 0)
    ids, tracks = np.unique(positive, return_inverse=True)
    return tracks.reshape(positive.shape) + int(ids[0] > 0)


def _by_area(tracks_THW: np.ndarray, num_valid: int, most: int) -> np.ndarray:
    """The `most` largest tracks numbered from 1, the largest first; 0 for the others and for those of no real frame."""
    areas = np.bincount(tracks_THW[:num_valid].ravel(), minlength=int(tracks_THW.max()) + 1)
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")[:most]
    order = order[areas[order] > 0]
    numbers = np.zeros(len(areas), np.int32)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[tracks_THW]


def _open_borders(tracks_THW: np.ndarray) -> None:
    """Set to 0, in place, pixels beside a smaller segment, and the first pixel of every frame.

    Trainers take labels from every n-th pixel: of all pixels the first alone is sure to be among them.
    """
    old = tracks_THW.copy()
    for axis in (1, 2):
        one, other = (tuple(_half(axis, i)) for i in (0, 1))
        a, b = old[one], old[other]
        tracks_THW[one][(a > 0) & (a < b)] = 0
        tracks_THW[other][(b > 0) & (b < a)] = 0
    tracks_THW[:, 0, 0] = 0


def _limit_frames(tracks_THW: np.ndarray) -> None:
    """Set to 0, in place, all but the first MOST_IDS tracks of every frame."""
    for frame in tracks_THW:
        present = np.bincount(frame.ravel()).nonzero()[0]
        present = present[present > 0]
        if len(present) > MOST_IDS:
            frame[frame >= present[MOST_IDS]] = 0


def _half(axis: int, i: int) -> list[slice]:
    """All pixels but the last (0) or the first (1) along an axis."""
    index = [slice(None)] * 3
    index[axis] = slice(i, None) if i else slice(None, -1)
    return index
