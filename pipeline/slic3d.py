"""Trajectories without weights: supervoxels of a window of frames (3-D SLIC), merged by colour, joined over windows."""

import math
from importlib.metadata import version
from itertools import pairwise

import numpy as np
from pydantic import Field
from skimage.color import rgb2lab
from skimage.segmentation import slic

from ..schemas.clip import ClipFrames, Sampling
from ..schemas.masks import SegmenterSpec
from ..schemas.recipe import Section
from .linking import LINK_REVISION, Joiner
from .resize import RESIZE_REVISION, resize_frame

LAB_STEPS = 64  # per unit: rounding hides what processors disagree about in the last digit
# Orthonormal: brightness, then two differences of colour, in columns.
OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]]).T / np.sqrt([3, 2, 1.5])
# Grey levels: a window whose colours spread less has its cut lowered alike, to LEAST_CUT of it at most.
FULL_SPREAD, LEAST_CUT = 42.0, 0.5
MOST_GRADIENT = 1.5  # cuts: segments that differ by more stay apart, even where one turns into the other slowly
LEAST_VOXELS = 16  # of a supervoxel, on average
STAY = 100.0  # squared grey levels: a pixel changes its track where it looks clearly more like another


class Slic3dOptions(Section):
    """What decides the trajectories of slic3d, apart from the frames."""

    num_supervoxels: int = Field(default=300, ge=1, le=1000, description="in a whole window, about")
    compactness: float = Field(default=12.0, gt=0, le=1000, description="how much nearness counts beside colour (Lab)")
    spacing: float = Field(default=4.0, gt=0, le=1000, description="pixels that a step in time counts as")
    iterations: int = Field(default=10, ge=1, le=100, description="of SLIC")
    cut: float = Field(default=24.0, ge=0, description="grey levels (RGB distance): segments that differ by more stay")
    brightness: float = Field(default=0.5, ge=0, le=1, description="how much brightness counts beside colour in it")
    least_share: float = Field(default=0.001, ge=0, lt=1, description="of a window: smaller segments join the nearest")
    rejoin: float = Field(default=15.0, gt=0, description="as cut: a trajectory is seen again if it differs by less")
    side: int = Field(default=112, ge=8, le=1024, description="frames are segmented at the area of this squared")
    window: int = Field(default=16, ge=2, le=256, description="frames segmented together, one shared with the next")


class Slic3d:
    """Segments by colour, nearness and time alone."""

    def __init__(self, options: Slic3dOptions) -> None:
        self.options = options

    @property
    def spec(self) -> SegmenterSpec:
        versions = {name: version(name) for name in ("scikit-image", "scipy", "numpy")}
        revisions = {"resize_revision": RESIZE_REVISION, "link_revision": LINK_REVISION}
        return SegmenterSpec(name="slic3d", options=self.options.model_dump(mode="json") | versions | revisions)

    def segment(self, one: ClipFrames) -> np.ndarray:
        """The tracks (T,H,W; int32) of a clip, from 1: every pixel is of one. Padding is as the last real frame."""
        return self._tracks(one.frames_THWC, one.clip.num_valid)

    def _tracks(self, frames_THWC: np.ndarray, num_valid: int) -> np.ndarray:
        tracks_THW = np.empty(frames_THWC.shape[:3], np.int32)
        joiner = Joiner(most_difference=self.options.rejoin)
        for start, stop in windows(num_valid, self.options.window):
            window_THWC = frames_THWC[start:stop]
            small_Thwc = shrunk(window_THWC, self.options.side)
            supervoxels_Thw = supervoxels(small_Thwc, self.options)
            colours_n3 = _means(supervoxels_Thw, small_Thwc)
            segments_n = merged(supervoxels_Thw, colours_n3, self.options)
            segments_Thw = segments_n[supervoxels_Thw]
            segment_colours_k3 = opponent(_means(segments_Thw, small_Thwc), self.options.brightness)
            tracks_n = joiner.join(segments_Thw, segment_colours_k3, start)[segments_n]
            for t in range(1 if start else 0, stop - start):
                tracks_THW[start + t] = sharpened(supervoxels_Thw[t], colours_n3, tracks_n, window_THWC[t])
        tracks_THW[num_valid:] = tracks_THW[num_valid - 1]
        return tracks_THW


def windows(num_frames: int, most: int) -> list[tuple[int, int]]:
    """Spans of frames of about one length, `most` frames at most; each begins with the last frame of the one before."""
    num = max(1, math.ceil((num_frames - 1) / (most - 1)))
    bounds = [i * (num_frames - 1) // num for i in range(num + 1)]
    return [(start, stop + 1) for start, stop in pairwise(bounds)]


def shrunk(frames_THWC: np.ndarray, side: int) -> np.ndarray:
    """The frames at the area of `side` squared and their own aspect; as they are where that is no smaller."""
    height, width = frames_THWC.shape[1:3]
    scale = min(1.0, side / math.sqrt(height * width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    sampling = Sampling(fps=None, num_frames=1, height=h, width=w, resize="squash/bilinear", tail="pad")
    return np.stack([resize_frame(frame, sampling) for frame in frames_THWC])


def supervoxels(small_Thwc: np.ndarray, options: Slic3dOptions) -> np.ndarray:
    """The supervoxel (int64, from 0) of each pixel, by SLIC in Lab, row, column and time.

    A window of fewer frames has fewer layers of them, not fewer in a frame.
    """
    num_voxels = small_Thwc[..., 0].size
    edge = (options.window * options.side**2 / options.num_supervoxels) ** (1 / 3)
    wanted = round(options.side**2 / edge**2 * max(1.0, len(small_Thwc) / edge))
    num = min(wanted, num_voxels // LEAST_VOXELS)
    lab_Thwc = np.rint(rgb2lab(small_Thwc) * LAB_STEPS) / LAB_STEPS
    span = lab_Thwc.max() - lab_Thwc.min()
    if num < 2 or span == 0:
        return np.zeros(small_Thwc.shape[:3], np.int64)
    # slic scales its input to span 1: the compactness is scaled alike, so that it means the same in every window.
    return slic(
        lab_Thwc, n_segments=num, compactness=options.compactness / span, max_num_iter=options.iterations,
        spacing=(options.spacing, 1, 1), convert2lab=False, start_label=0, channel_axis=-1,
    )  # fmt: skip


def merged(supervoxels_Thw: np.ndarray, colours_n3: np.ndarray, options: Slic3dOptions) -> np.ndarray:
    """The segment (from 0) of each supervoxel of these mean RGB colours.

    The two neighbours that differ least become one, again and again, until all differ by more than the cut (less where
    colours spread little). Then segments below the least share go to the neighbour that differs least.
    """
    sizes_n = np.bincount(supervoxels_Thw.ravel(), minlength=len(colours_n3))
    opponent_n3 = opponent(colours_n3, options.brightness)
    graph = SegmentGraph(sizes_n, opponent_n3, faces_between(supervoxels_Thw))
    cut = options.cut * max(LEAST_CUT, min(1.0, _spread(opponent_n3, sizes_n) / FULL_SPREAD))
    while (pair := graph.nearest_pair()) is not None and graph.costs_nn[pair] <= cut:
        graph.merge(*pair)
    least = options.least_share * supervoxels_Thw.size
    while (i := graph.smallest()) is not None and graph.sizes_n[i] < least:
        graph.merge(int(graph.costs_nn[i].argmin()), i)
    return np.unique(graph.segments_n, return_inverse=True)[1]


def opponent(colours_n3: np.ndarray, brightness: float) -> np.ndarray:
    """RGB as brightness, times a weight, and two differences of colour: light and shade change the first alone."""
    scaled = OPPONENT * np.array([brightness, 1, 1])
    # Not a matrix product: its last digits would depend on the processor.
    red, green, blue = (colours_n3[:, i : i + 1] * scaled[i] for i in range(3))
    return red + green + blue


def faces_between(labels_Thw: np.ndarray) -> np.ndarray:
    """How many faces (n,n) the voxels of two labels share, in time, rows and columns; 0 on the diagonal."""
    num = int(labels_Thw.max()) + 1
    counts = np.zeros(num * num, np.int64)
    for axis in range(3):
        size = labels_Thw.shape[axis]
        one, other = labels_Thw.take(range(size - 1), axis), labels_Thw.take(range(1, size), axis)
        counts += np.bincount((one * num + other)[one != other], minlength=num * num)
    faces_nn = counts.reshape(num, num)
    return faces_nn + faces_nn.T


class SegmentGraph:
    """Segments that merge: their sizes and colours, the faces between them, and what merging two would cost.

    The cost is the difference of mean colours, or the mean difference of the supervoxels at their common border,
    whichever is less: the first holds a texture together, the second a gradient. It is infinite for pairs that do not
    touch.
    """

    def __init__(self, sizes_n: np.ndarray, colours_n3: np.ndarray, faces_nn: np.ndarray) -> None:
        self.sizes_n = sizes_n.astype(np.float64)
        self.sums_n3 = colours_n3 * self.sizes_n[:, None]
        self.faces_nn = faces_nn.astype(np.float64)
        self.contrasts_nn = self.faces_nn * _distances(colours_n3, colours_n3)
        self.segments_n = np.arange(len(sizes_n))
        with np.errstate(invalid="ignore"):
            self.costs_nn = np.where(faces_nn > 0, self.contrasts_nn / self.faces_nn, np.inf)

    def nearest_pair(self) -> tuple[int, int] | None:
        """The two segments that are cheapest to merge; None where none touch."""
        i, j = divmod(int(self.costs_nn.argmin()), len(self.costs_nn))
        return None if np.isinf(self.costs_nn[i, j]) else (i, j)

    def smallest(self) -> int | None:
        """The smallest segment that touches another; None where there is none."""
        touching = np.flatnonzero(np.isfinite(self.costs_nn).any(axis=1))
        return int(touching[self.sizes_n[touching].argmin()]) if len(touching) else None

    def merge(self, i: int, j: int) -> None:
        """Make segment j part of segment i."""
        self.segments_n[self.segments_n == j] = i
        self.sizes_n[i] += self.sizes_n[j]
        self.sums_n3[i] += self.sums_n3[j]
        for table_nn in (self.faces_nn, self.contrasts_nn):
            table_nn[i] += table_nn[j]
            table_nn[i, [i, j]] = 0
            table_nn[:, i] = table_nn[i]
            table_nn[j] = table_nn[:, j] = 0
        for k in (i, j):
            self.costs_nn[k] = self.costs_nn[:, k] = np.inf
        beside = np.flatnonzero(self.faces_nn[i])
        colours = self.sums_n3[[i, *beside]] / self.sizes_n[[i, *beside], None]
        apart = _distances(colours[1:], colours[:1])[:, 0]
        costs = np.minimum(apart, self.contrasts_nn[i, beside] / self.faces_nn[i, beside])
        costs = np.maximum(costs, apart / MOST_GRADIENT)
        self.costs_nn[i, beside] = self.costs_nn[beside, i] = costs


def sharpened(
    supervoxels_hw: np.ndarray, colours_n3: np.ndarray, tracks_n: np.ndarray, frame_HWC: np.ndarray
) -> np.ndarray:
    """The tracks of a frame at its full size: beside borders, those of the nearby supervoxels that pixels look like."""
    h, w = supervoxels_hw.shape
    height, width = frame_HWC.shape[:2]
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    columns = (2 * np.arange(width) + 1) * w // (2 * width)
    tracks_hw = tracks_n[supervoxels_hw]
    tracks_HW = tracks_hw[rows][:, columns]
    y, x = at_borders(tracks_hw)[rows][:, columns].nonzero()
    pixels_p3 = frame_HWC[y, x].astype(np.float32)
    framed_hw = np.pad(supervoxels_hw, 1, mode="edge")
    means_n3 = colours_n3.astype(np.float32)
    best_p, own_p = np.full(len(y), np.inf, np.float32), tracks_HW[y, x]
    for dy in range(3):
        for dx in range(3):
            candidates_p = framed_hw[rows[y] + dy, columns[x] + dx]
            apart_p3 = pixels_p3 - means_n3[candidates_p]
            apart_p = (apart_p3 * apart_p3).sum(axis=1) + STAY * (tracks_n[candidates_p] != own_p)
            better = apart_p < best_p
            best_p[better] = apart_p[better]
            tracks_HW[y[better], x[better]] = tracks_n[candidates_p[better]]
    return tracks_HW


def at_borders(tracks_hw: np.ndarray) -> np.ndarray:
    """Which pixels have a neighbour in their row or column that is of another track."""
    is_border = np.zeros(tracks_hw.shape, bool)
    down, right = tracks_hw[1:] != tracks_hw[:-1], tracks_hw[:, 1:] != tracks_hw[:, :-1]
    is_border[1:] |= down
    is_border[:-1] |= down
    is_border[:, 1:] |= right
    is_border[:, :-1] |= right
    return is_border


def _means(labels_Thw: np.ndarray, values_Thwc: np.ndarray) -> np.ndarray:
    """The mean of the values (n,3) of each label."""
    flat = labels_Thw.ravel()
    sums = [np.bincount(flat, weights=values_Thwc[..., i].ravel()) for i in range(3)]
    return np.stack(sums, axis=1) / np.bincount(flat)[:, None]


def _spread(colours_n3: np.ndarray, sizes_n: np.ndarray) -> float:
    """The standard deviation of the colours of so many pixels each, over all three values."""
    weights_n1 = sizes_n[:, None] / sizes_n.sum()
    apart_n3 = colours_n3 - (colours_n3 * weights_n1).sum(axis=0)
    return math.sqrt(float((apart_n3 * apart_n3 * weights_n1).sum()))


def _distances(one_n3: np.ndarray, other_m3: np.ndarray) -> np.ndarray:
    apart_nm3 = one_n3[:, None] - other_m3
    return np.sqrt((apart_nm3 * apart_nm3).sum(axis=2))
