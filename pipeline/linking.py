"""Linking: which trajectory goes on as which, from clip to clip of a video, and from window to window of a clip."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..schemas.clip import Sampling
from .resize import resize_frame

# Rises with every change of this file that changes links.
LINK_REVISION = 1

MOST_SIDE = 112  # pixels: a larger picture is scaled down
LEAST_IOU = 0.3  # of a moved segment and the one it is linked to
COARSE_STRIDE, COARSE_REACH, FINE_REACH = 4, 8, 3  # in pixels; 35 pixels are found, a third of a picture's side
MOST_DIFFERENCE = 24  # grey levels: what a pixel that is hidden, or hides, may count at most
MOST_MEAN_DIFFERENCE = 16  # grey levels: a segment that fits nowhere better is not there any more
# Grey levels for a motion over a whole side: of two places that fit alike the nearer one is right.
COST_OF_MOTION = 8.0

LEAST_PRESENCE = 0.05  # of a segment's largest area: a frame with less of it shows it by mistake
MOST_ABSENCE = 16  # frames
MOST_SPEED = 0.1  # of a picture's side, per frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """The first or last frame of a stretch of video, and its segments: what is needed to link it to its neighbour.

    `grey_hw` (uint8) has at most 112 pixels a side; `tracks_hw` (int32) is the track of each of them, 0 for none.
    """

    grey_hw: np.ndarray
    tracks_hw: np.ndarray

    def __post_init__(self) -> None:
        grey, tracks = self.grey_hw, self.tracks_hw
        if grey.dtype != np.uint8 or grey.ndim != 2 or not grey.size or max(grey.shape) > MOST_SIDE:
            raise ValueError(
                f"an edge's picture must be uint8 of at most {MOST_SIDE} pixels a side, found {grey.dtype} {grey.shape}"
            )
        if tracks.dtype != np.int32 or tracks.shape != grey.shape:
            raise ValueError(f"tracks must be int32 beside a picture {grey.shape}, found {tracks.dtype} {tracks.shape}")


def edge_of(frame_HWC: np.ndarray, tracks_HW: np.ndarray) -> Edge:
    """The edge that this uint8 RGB frame and the tracks of its pixels (integers, 0 for none) make.

    The picture is BT.601 luma of the frame scaled down with antialiasing; a track is that of the nearest pixel.
    ValueError where they differ in size.
    """
    if frame_HWC.shape[:2] != tracks_HW.shape:
        raise ValueError(f"a frame {frame_HWC.shape} needs tracks of its height and width, found {tracks_HW.shape}")
    height, width = frame_HWC.shape[:2]
    scale = min(1.0, MOST_SIDE / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    sampling = Sampling(fps=None, num_frames=1, height=h, width=w, resize="squash/bilinear", tail="pad")
    red, green, blue = np.moveaxis(resize_frame(frame_HWC, sampling).astype(np.int32), 2, 0)
    rows, columns = (2 * np.arange(h) + 1) * height // (2 * h), (2 * np.arange(w) + 1) * width // (2 * w)
    return Edge(
        grey_hw=((77 * red + 150 * green + 29 * blue + 128) >> 8).astype(np.uint8),
        tracks_hw=tracks_HW[np.ix_(rows, columns)].astype(np.int32),
    )


def links(before: Edge, after: Edge) -> dict[int, int]:
    """The tracks of `after` that go on tracks of `before`: number there -> number here, one to one, sorted.

    Every segment of `before` is moved to where its grey values fit best; the segments moved and those of `after` are
    matched one to one by their IoU (Hungarian algorithm), and pairs below LEAST_IOU are none. All arithmetic is in
    integers or in single roundings, so the links are the same everywhere. ValueError where the sizes differ.
    """
    if before.grey_hw.shape != after.grey_hw.shape:
        raise ValueError(
            f"edges of one size are linked, found {before.grey_hw.shape} before {after.grey_hw.shape}:"
            f" scale the frames of a video alike"
        )
    ids, segments_hw = _numbered(before.tracks_hw)
    next_ids, next_hw = _numbered(after.tracks_hw)
    motions_k2, differences_k = _motions(before.grey_hw, after.grey_hw, segments_hw, len(ids))
    iou_kj = _overlaps(segments_hw, motions_k2, next_hw, len(ids), len(next_ids))
    iou_kj[(differences_k > MOST_MEAN_DIFFERENCE) | (ids == 0)] = 0
    iou_kj[:, next_ids == 0] = 0
    return one_to_one(iou_kj, ids, next_ids, LEAST_IOU)


def links_of_one_frame(before_HW: np.ndarray, after_HW: np.ndarray) -> dict[int, int]:
    """As `links`, of two sets of tracks of the very same frame, where nothing has moved."""
    ids, segments_hw = _numbered(before_HW)
    next_ids, next_hw = _numbered(after_HW)
    iou_kj = _overlaps(segments_hw, np.zeros((len(ids), 2), np.int64), next_hw, len(ids), len(next_ids))
    iou_kj[ids == 0] = 0
    iou_kj[:, next_ids == 0] = 0
    return one_to_one(iou_kj, ids, next_ids, LEAST_IOU)


def one_to_one(iou_kj: np.ndarray, ids_k: np.ndarray, next_ids_j: np.ndarray, least: float) -> dict[int, int]:
    """The pairs j -> k, by their ids, that have the largest sum of IoU, of those with `least` or more."""
    iou_kj = np.where(iou_kj >= least, iou_kj, 0)
    k, j = linear_sum_assignment(iou_kj, maximize=True)
    pairs = ((int(next_ids_j[b]), int(ids_k[a])) for a, b in zip(k, j, strict=True) if iou_kj[a, b] > 0)
    return dict(sorted(pairs))


def _numbered(tracks_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that occur, and for each pixel the place of its id among them."""
    ids, places = np.unique(tracks_hw, return_inverse=True)
    return ids, places.reshape(tracks_hw.shape)


def _overlaps(
    segments_hw: np.ndarray, motions_k2: np.ndarray, next_hw: np.ndarray, num: int, num_next: int
) -> np.ndarray:
    """IoU (K,J) of the segments, each moved by its motion, and the next ones."""
    y, x = np.indices(segments_hw.shape, np.int64)
    y, x = y + motions_k2[segments_hw, 0], x + motions_k2[segments_hw, 1]
    h, w = segments_hw.shape
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    pairs = segments_hw[inside] * num_next + next_hw[y[inside], x[inside]]
    shared_kj = np.bincount(pairs, minlength=num * num_next).reshape(num, num_next)
    areas_k, next_areas_j = shared_kj.sum(axis=1), np.bincount(next_hw.ravel(), minlength=num_next)
    return shared_kj / (areas_k[:, None] + next_areas_j - shared_kj)


def _motions(
    grey_hw: np.ndarray, next_hw: np.ndarray, segments_hw: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """By how many rows and columns (K,2) each segment moves to the next picture, and the mean difference (K) there.

    Found near its old place, and near the best place in pictures of a quarter of the size: the grey values of a whole
    segment find motions that optical flow, which follows small ones pixel by pixel, does not.
    """
    still_k2 = np.zeros((num, 2), np.int64)
    grey_hw, next_hw = grey_hw.astype(np.int32), next_hw.astype(np.int32)
    near = _best_motions(grey_hw, next_hw, segments_hw, still_k2, FINE_REACH)
    if min(grey_hw.shape) < COARSE_STRIDE * COARSE_REACH:
        return near[0], near[1]
    half = COARSE_STRIDE // 2
    coarse_hw = segments_hw[half::COARSE_STRIDE, half::COARSE_STRIDE]
    pooled_hw, next_pooled_hw = (_pooled(one, coarse_hw.shape) for one in (grey_hw, next_hw))
    coarse_k2 = COARSE_STRIDE * _best_motions(pooled_hw, next_pooled_hw, coarse_hw, still_k2, COARSE_REACH)[0]
    far = _best_motions(grey_hw, next_hw, segments_hw, coarse_k2, FINE_REACH)
    is_near_k = near[2] <= far[2]
    return np.where(is_near_k[:, None], near[0], far[0]), np.where(is_near_k, near[1], far[1])


def _pooled(grey_hw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The means (int32) of blocks of COARSE_STRIDE squared, as many as `shape` says; blocks at the rim are cut."""
    missing = [(0, max(0, size * COARSE_STRIDE - had)) for size, had in zip(shape, grey_hw.shape, strict=True)]
    full_hw = np.pad(grey_hw, missing, mode="edge")[: shape[0] * COARSE_STRIDE, : shape[1] * COARSE_STRIDE]
    sums_hw = full_hw.reshape(shape[0], COARSE_STRIDE, shape[1], COARSE_STRIDE).sum(axis=(1, 3))
    return sums_hw // COARSE_STRIDE**2


def _best_motions(
    grey_hw: np.ndarray, next_hw: np.ndarray, segments_hw: np.ndarray, start_k2: np.ndarray, reach: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best motions (K,2) within `reach` of where they start, the mean differences (K) there, and their costs (K).

    A motion counts that keeps half of the segment in the picture; of equal ones the first, nearest to the start, is
    best.
    """
    h, w = grey_hw.shape
    num = len(start_k2)
    flat = segments_hw.ravel()
    areas_k = np.bincount(flat, minlength=num)
    # Pictures framed so widely with -1 that every motion stays inside; a motion is a distance in the flat picture.
    frame = reach + int(np.abs(start_k2).max(initial=0))
    framed = np.pad(next_hw, frame, constant_values=-1).ravel()
    row = w + 2 * frame
    places = ((np.arange(h)[:, None] + frame) * row + np.arange(w) + frame).ravel() + (start_k2 @ (row, 1))[flat]
    grey = grey_hw.ravel()
    steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    best_k, differences_k, motions_k2 = np.full(num, np.inf), np.full(num, np.inf), start_k2.copy()
    for step in sorted(steps, key=lambda step: (step[0] ** 2 + step[1] ** 2, step)):
        moved = framed.take(places + (step[0] * row + step[1]))
        inside = moved >= 0
        differences = np.minimum(np.abs(moved - grey), MOST_DIFFERENCE) * inside
        counts_k = np.bincount(flat, weights=inside, minlength=num)
        sums_k = np.bincount(flat, weights=differences, minlength=num)
        means_k = np.where(2 * counts_k >= areas_k, sums_k / np.maximum(counts_k, 1), np.inf)
        motion_k2 = start_k2 + step
        costs_k = means_k + COST_OF_MOTION * np.sqrt((motion_k2**2).sum(axis=1)) / max(h, w)
        better = costs_k < best_k
        best_k[better], differences_k[better] = costs_k[better], means_k[better]
        motions_k2[better] = motion_k2[better]
    return motions_k2, differences_k, best_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Where a trajectory is seen: the frame of the clip, its middle and its width, about, in pixels."""

    frame: int
    row: float
    column: float
    width: float
    colour_3: np.ndarray


class Joiner:
    """Numbers the trajectories of a clip, window by window; a window begins with the last frame of the one before.

    Holds what was seen last of the trajectories of the last MOST_ABSENCE frames, and no frames.
    """

    def __init__(self, most_difference: float) -> None:
        self._most_difference = most_difference
        self._num_tracks = 0
        self._end_hw: np.ndarray | None = None
        self._seen: dict[int, Sighting] = {}

    def join(self, segments_Thw: np.ndarray, colours_k3: np.ndarray, start: int) -> np.ndarray:
        """The trajectory (int32, from 1) of each segment (from 0) of the window that begins with frame `start`.

        A segment goes on the trajectory that it shares most of the common frame with. Others go on a trajectory that
        vanished nearby, a short time before they came, and whose colour differs by less than `most_difference`:
        something passed in front of it. What is left is new.
        """
        numbers_k = np.zeros(len(colours_k3), np.int32)
        if self._end_hw is not None:
            for after, before in links_of_one_frame(self._end_hw, segments_Thw[0] + 1).items():
                numbers_k[after - 1] = before
        firsts, lasts = sightings(segments_Thw, colours_k3, start)
        gone = {number: seen for number, seen in self._seen.items() if start - seen.frame < MOST_ABSENCE}
        gone = {number: seen for number, seen in gone.items() if number not in numbers_k}
        fresh = np.flatnonzero(numbers_k == 0)
        came_from = self._same_again([*lasts, *gone.values()], [firsts[k] for k in fresh], max(segments_Thw.shape[1:]))
        earlier = {int(fresh[j]): i for j, i in came_from.items()}
        for k in sorted(fresh.tolist(), key=lambda k: firsts[k].frame):
            if k not in earlier:
                self._num_tracks += 1
                numbers_k[k] = self._num_tracks
            elif earlier[k] < len(lasts):
                numbers_k[k] = numbers_k[earlier[k]]
            else:
                numbers_k[k] = list(gone)[earlier[k] - len(lasts)]
        self._end_hw = numbers_k[segments_Thw[-1]]
        order = sorted(range(len(lasts)), key=lambda k: lasts[k].frame)
        self._seen = gone | {int(numbers_k[k]): lasts[k] for k in order}
        return numbers_k

    def _same_again(self, before: Sequence[Sighting], after: Sequence[Sighting], side: int) -> dict[int, int]:
        """Which sighting of `before` each of `after` may be the next one of, one to one, as places in the lists."""
        likeness = np.zeros((len(before), len(after)))
        for j, new in enumerate(after):
            for i, old in enumerate(before):
                passed = new.frame - old.frame
                reach = MOST_SPEED * side * passed + (old.width + new.width) / 2
                apart = math.hypot(new.row - old.row, new.column - old.column)
                if 1 <= passed <= MOST_ABSENCE and apart <= reach:
                    difference = math.sqrt(float(((new.colour_3 - old.colour_3) ** 2).sum()))
                    likeness[i, j] = 1 - difference / self._most_difference
        return one_to_one(likeness, np.arange(len(before)), np.arange(len(after)), 1e-6)


def sightings(segments_Thw: np.ndarray, colours_k3: np.ndarray, start: int) -> tuple[list[Sighting], list[Sighting]]:
    """Where each segment (from 0) of a window that begins with frame `start` is seen first, and last."""
    num_frames, num = len(segments_Thw), len(colours_k3)
    keys = (np.arange(num_frames)[:, None, None] * num + segments_Thw).ravel()
    y, x = (np.broadcast_to(place, segments_Thw.shape).ravel() for place in np.indices(segments_Thw.shape[1:]))
    areas, ys, xs = (np.bincount(keys, one, num_frames * num).reshape(num_frames, num) for one in (None, y, x))
    is_seen = (areas > 0) & (areas >= LEAST_PRESENCE * areas.max(axis=0))
    first_k, last_k = is_seen.argmax(axis=0), num_frames - 1 - is_seen[::-1].argmax(axis=0)

    def seen(k: int, t: int) -> Sighting:
        area = float(areas[t, k])
        place = {"row": float(ys[t, k]) / area, "column": float(xs[t, k]) / area}
        return Sighting(frame=start + t, **place, width=math.sqrt(area), colour_3=colours_k3[k])

    return [seen(k, int(t)) for k, t in enumerate(first_k)], [seen(k, int(t)) for k, t in enumerate(last_k)]
