"""Segmenting: the frames of a clip -> masks and trajectories, as trainers of TrajTok read them (spec section 5)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..schemas.clip import ClipFailure, ClipFrames
from ..schemas.masks import MOST_IDS, ClipMasks, SegmenterSpec


class Segmenter(Protocol):
    """Turns frames into trajectories. Holds the weights, if it has any."""

    @property
    def spec(self) -> SegmenterSpec:
        """What decides the masks, apart from the frames."""
        ...

    def segment(self, clips: Sequence[ClipFrames]) -> "list[np.ndarray | ClipFailure]":
        """For each clip its tracks (T,H,W), integers at the size of its frames, or why it has none.

        A track is the same number, 1 or more, in all frames of the clip where a trajectory is seen; 0 is no trajectory.
        """
        ...


class FakeSegmenter:
    """Two trajectories: what is brighter than the clip's mean, and what is not."""

    spec = SegmenterSpec(name="fake")

    def segment(self, clips: Sequence[ClipFrames]) -> list[np.ndarray | ClipFailure]:
        grey = [one.frames_THWC.astype(np.int32).sum(axis=3) for one in clips]
        return [1 + (one_THW > one_THW.mean()).astype(np.int32) for one_THW in grey]


def masks_of(tracks_THW: np.ndarray, num_valid: int, most: int) -> ClipMasks:
    """The masks of the `most` largest tracks of a clip, those of its `num_valid` real frames counting.

    Where two segments touch, the pixels of the larger trajectory along the border are 0, so that every frame has
    pixels of no segment; a frame that has none else loses its first pixel. A frame keeps its MOST_IDS largest segments.
    """
    ids, tracks = np.unique(tracks_THW, return_inverse=True)
    tracks = tracks.reshape(tracks_THW.shape) + (1 if ids[0] > 0 else 0)
    tracks = _by_area(tracks, num_valid, most)
    _open_borders(tracks)
    tracks = _by_area(tracks, num_valid, most)
    num = int(tracks.max())
    masks_THW = tracks.astype(np.uint8) if num <= MOST_IDS else np.stack([_local_ids(frame) for frame in tracks])
    graph_MT = np.zeros((num, len(tracks)), np.int64)
    for t, (frame, mask) in enumerate(zip(tracks, masks_THW, strict=True)):
        graph_MT[frame[mask > 0] - 1, t] = mask[mask > 0]
    return ClipMasks(masks_THW=masks_THW, graph_MT=graph_MT, num_valid=num_valid)


def _by_area(tracks_THW: np.ndarray, num_valid: int, most: int) -> np.ndarray:
    """The `most` largest tracks numbered from 1, the largest first; 0 for the others, and for those of no real frame."""
    areas = np.bincount(tracks_THW[:num_valid].ravel(), minlength=int(tracks_THW.max()) + 1)
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")[:most]
    order = order[areas[order] > 0]
    numbers = np.zeros(len(areas), np.int32)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[tracks_THW]


def _open_borders(tracks_THW: np.ndarray) -> None:
    """Set to 0, in place, pixels beside a smaller segment, and one pixel of every frame that has no 0 then."""
    old = tracks_THW.copy()
    for axis in (1, 2):
        one, other = (tuple(_half(axis, i)) for i in (0, 1))
        a, b = old[one], old[other]
        tracks_THW[one][(a > 0) & (a < b)] = 0
        tracks_THW[other][(b > 0) & (b < a)] = 0
    full = (tracks_THW > 0).all(axis=(1, 2))
    tracks_THW[full, 0, 0] = 0


def _half(axis: int, i: int) -> list[slice]:
    """All pixels but the last (0) or the first (1) along an axis."""
    index = [slice(None)] * 3
    index[axis] = slice(i, None) if i else slice(None, -1)
    return index


def _local_ids(frame_HW: np.ndarray) -> np.ndarray:
    """The tracks of one frame numbered from 1 in their order, MOST_IDS at most; the smaller ones behind them are 0."""
    present = np.unique(frame_HW)
    present = present[present > 0][:MOST_IDS]
    ids = np.zeros(int(frame_HW.max()) + 1, np.uint8)
    ids[present] = np.arange(1, len(present) + 1)
    return ids[frame_HW]
