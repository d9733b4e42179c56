"""What a segmenter is, and the pseudo-labels that it makes of a clip."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_IDS = 255  # segments of one frame: ids are uint8, 0 is no segment


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterSpec:
    """Everything about a segmenter that decides its masks, apart from the frames.

    `options` are its settings by name, as JSON has them. `dtype` is the number type of its networks' arithmetic, None
    where it has none. `revision` rises with every change of our code that changes masks.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    dtype: str | None = None
    revision: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipMasks:
    """Segments of one clip, and the trajectories that they make up.

    `masks_THW` (uint8) holds for every pixel the id of its segment in that frame, 0 where it is in none: every frame
    has such a pixel. `graph_MT` (int64) says which id trajectory m has in frame t, 0 where it is absent. Trajectories
    are sorted by area, the largest first. The first `num_valid` frames are real, the others repeat the last of them.
    """

    masks_THW: np.ndarray
    graph_MT: np.ndarray
    num_valid: int

    def __post_init__(self) -> None:
        masks, graph = self.masks_THW, self.graph_MT
        if masks.dtype != np.uint8 or masks.ndim != 3:
            raise ValueError(f"masks must be (T,H,W) uint8, found {masks.dtype} {masks.shape}")
        if graph.dtype != np.int64 or graph.ndim != 2 or graph.shape[1] != len(masks):
            raise ValueError(f"a graph must be (M,T) int64 beside masks {masks.shape}: {graph.dtype} {graph.shape}")
        if not 1 <= self.num_valid <= len(masks):
            raise ValueError(f"of {len(masks)} frames one or more are real, found {self.num_valid=}")

    @property
    def areas_MT(self) -> np.ndarray:
        """Pixels (int64) of each trajectory in each frame."""
        counts = np.stack([np.bincount(mask.ravel(), minlength=MOST_IDS + 1) for mask in self.masks_THW], axis=1)
        counts[0] = 0
        return np.take_along_axis(counts, self.graph_MT, axis=0)

    @property
    def tracks_THW(self) -> np.ndarray:
        """For every pixel its trajectory as 1 + its row in the graph (int32), 0 where it is of none."""
        tracks = np.empty(self.masks_THW.shape, np.int32)
        for t, mask in enumerate(self.masks_THW):
            row_of_id = np.zeros(MOST_IDS + 1, np.int32)
            present = self.graph_MT[:, t].nonzero()[0]
            row_of_id[self.graph_MT[present, t]] = 1 + present
            row_of_id[0] = 0
            tracks[t] = row_of_id[mask]
        return tracks
