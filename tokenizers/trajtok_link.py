"""Trajectories of a long clip: its chunks are looked at one by one, and slots with like features are linked."""

from typing import Literal

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from ..schemas.recipe import Section

NO_TRAJECTORY = -1
DIGITS = 6  # of similarities: what is behind them differs between machines, and would decide ties


class LinkOptions(Section):
    """How a clip is cut into chunks, and how their trajectories become those of the clip."""

    chunk_frames: int = Field(default=8, ge=1, description="frames looked at together; the networks were trained on 8")
    link: Literal["queries", "none"] = Field(
        default="queries",
        description="by the similarity of slots' features; none: every chunk has its own trajectories",
    )
    link_threshold: float = Field(
        default=0.0, ge=-1, le=1, description="the least similarity (cosine) that links; 0 as published, -1: always"
    )

    @property
    def threshold(self) -> float | None:
        """What `linked` takes: None where nothing is to be linked."""
        return self.link_threshold if self.link == "queries" else None


def linked(queries_CKD: np.ndarray, valid_CK: np.ndarray, threshold: float | None) -> np.ndarray:
    """The trajectory (C,K) int64 of every slot of every chunk, from 0 in the order of chunks and slots.

    NO_TRAJECTORY stands where a slot is not `valid`. The slots of a chunk are compared, by the cosine of their
    features, with the last that was seen of each earlier trajectory, whichever chunk that was: one that vanishes can
    come back. Pairs are the best in sum (Hungarian) of those that reach `threshold`; slots without one begin
    trajectories. Ties go the same way every time. Without a threshold all slots begin trajectories.
    """
    trajectories_CK = np.full(valid_CK.shape, NO_TRAJECTORY, np.int64)
    units_CKD = _units(queries_CKD)
    latest_MD = np.empty((0, queries_CKD.shape[2]))
    for c, valid_K in enumerate(valid_CK):
        slots = valid_K.nonzero()[0]
        found = _matched(units_CKD[c, slots], latest_MD, threshold)
        is_new = found == NO_TRAJECTORY
        found[is_new] = len(latest_MD) + np.arange(is_new.sum())
        latest_MD = np.concatenate((latest_MD, units_CKD[c, slots[is_new]]))
        latest_MD[found] = units_CKD[c, slots]
        trajectories_CK[c, slots] = found
    return trajectories_CK


def _matched(units_SD: np.ndarray, latest_MD: np.ndarray, threshold: float | None) -> np.ndarray:
    """For each row of `units` its row of `latest`, or NO_TRAJECTORY."""
    found = np.full(len(units_SD), NO_TRAJECTORY, np.int64)
    if threshold is None:
        return found
    similarity_SM = np.round(units_SD @ latest_MD.T, DIGITS)
    rows, columns = linear_sum_assignment(np.maximum(similarity_SM - threshold, 0), maximize=True)
    reaches = similarity_SM[rows, columns] >= threshold
    found[rows[reaches]] = columns[reaches]
    return found


def _units(features: np.ndarray) -> np.ndarray:
    """Features of length 1 in float64; those that are not finite, or nothing, are like no other."""
    features = np.where(np.isfinite(features).all(axis=-1, keepdims=True), features, 0).astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
