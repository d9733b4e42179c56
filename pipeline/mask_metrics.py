"""Scores of predicted trajectories against true ones. All of them see one table: which pixels two tracks share.

Tracks are integers (T,H,W) of one shape, 0 for no trajectory. Pixels that are 0 in the truth are ignored everywhere:
there nobody knows what is right, so they count neither for nor against a prediction.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

LEAST_IOU = 0.5  # above it a match is unique


@dataclass(frozen=True)
class Overlaps:
    """Pixels that predicted and true tracks share: `shared_pj` (int64) of track p and true track j.

    Row 0 is no predicted trajectory; every column is a true one. Rows and columns without a pixel are left out, but row
    0 is always there.
    """

    shared_pj: np.ndarray

    @cached_property
    def iou_pj(self) -> np.ndarray:
        """Spatio-temporal IoU of each predicted trajectory (without row 0) and each true one."""
        shared_pj = self.shared_pj[1:]
        unions_pj = shared_pj.sum(axis=1, keepdims=True) + self.shared_pj.sum(axis=0) - shared_pj
        return shared_pj / unions_pj


def overlaps_of(predicted_THW: np.ndarray, true_THW: np.ndarray) -> Overlaps:
    """The table of two sets of tracks; ValueError unless they are integers of one shape, 0 or more."""
    for name, tracks in (("predicted", predicted_THW), ("true", true_THW)):
        if tracks.ndim != 3 or not np.issubdtype(tracks.dtype, np.integer):
            raise ValueError(f"{name} tracks must be integers (T,H,W), found {tracks.dtype} of shape {tracks.shape}")
        if tracks.size and tracks.min() < 0:
            raise ValueError(f"{name} tracks are numbered from 1, 0 is none, found {tracks.min()}")
    if predicted_THW.shape != true_THW.shape:
        raise ValueError(
            f"tracks of one clip are compared, found predicted {predicted_THW.shape} and true {true_THW.shape}"
        )
    known = true_THW != 0
    predicted, true = _numbered(predicted_THW[known]), _numbered(true_THW[known])
    num_true = int(true.max(initial=0)) + 1
    num = int(predicted.max(initial=0)) + 1
    table = np.bincount(predicted * num_true + true, minlength=num * num_true).reshape(num, num_true)
    return Overlaps(table[:, 1:])


def tube_iou(overlaps: Overlaps) -> float:
    """Mean over the true trajectories of the IoU with the predicted one that each is matched to.

    IoU is over all frames at once, the matching is one to one with the largest sum (Hungarian algorithm), and a true
    trajectory without a partner counts 0. Predictions beyond them cost nothing by themselves. NaN without any truth.
    """
    iou_pj = overlaps.iou_pj
    if not iou_pj.shape[1]:
        return float("nan")
    return float(iou_pj[linear_sum_assignment(iou_pj, maximize=True)].sum() / iou_pj.shape[1])


def frame_iou(predicted_THW: np.ndarray, true_THW: np.ndarray) -> float:
    """The mean of `tube_iou` of every frame on its own, over the frames that show a true trajectory.

    Identities may change from frame to frame: what this has and `tube_iou` has not is lost in time. NaN without any
    truth.
    """
    pairs = zip(predicted_THW[:, None], true_THW[:, None], strict=True)
    scores = [tube_iou(overlaps_of(*pair)) for pair in pairs]
    known = [score for score in scores if not np.isnan(score)]
    return float(np.mean(known)) if known else float("nan")


def entity_quality(overlaps: Overlaps) -> float:
    """Video panoptic quality with all trajectories as one class (VEQ), over tubes of the whole clip.

    The sum of the IoU of matched pairs, over TP + FP/2 + FN/2: pairs match whose IoU is above 0.5 (each tube has one
    such partner at most), TP counts them, FP the predicted trajectories left, FN the true ones left. A predicted
    trajectory that lies on unknown pixels alone is not counted. NaN where there are neither.
    """
    iou_pj = overlaps.iou_pj
    if not sum(iou_pj.shape):
        return float("nan")
    matched = iou_pj[iou_pj > LEAST_IOU]
    # TP + FP/2 + FN/2 = (predicted + true) / 2.
    return float(matched.sum() * 2 / sum(iou_pj.shape))


def segmentation_tracking_quality(overlaps: Overlaps) -> float:
    """STQ = sqrt(AQ x SQ) (STEP, Weber et al. 2021, arXiv:2102.11859), without classes.

    AQ: every pair of a predicted track p and a true track g has TPA, the pixels that they share, FPA = |p| - TPA and
    FNA = |g| - TPA, so that IoU_id = TPA / (TPA + FPA + FNA). AQ is the mean over true tracks g of
    (1 / |g|) x the sum over p of TPA(p,g) x IoU_id(p,g). SQ is the mean IoU over classes; here is one class, pixels of
    any trajectory against pixels of none, and as unknown pixels are ignored SQ is the share of known pixels that a
    trajectory was predicted for. NaN without any truth.
    """
    shared_pj = overlaps.shared_pj
    if not shared_pj.shape[1]:
        return float("nan")
    areas_j = shared_pj.sum(axis=0)
    association = ((shared_pj[1:] * overlaps.iou_pj).sum(axis=0) / areas_j).mean()
    segmentation = shared_pj[1:].sum() / shared_pj.sum()
    return float(np.sqrt(association * segmentation))


def _numbered(tracks: np.ndarray) -> np.ndarray:
    """The tracks (int64) numbered without gaps from 1, 0 staying 0."""
    most = int(tracks.max(initial=0))
    if most > 2 * tracks.size + 1024:
        ids, places = np.unique(tracks, return_inverse=True)
        return places + (1 if ids.size and ids[0] > 0 else 0)
    occurs = np.zeros(most + 1, bool)
    occurs[tracks] = True
    occurs[0] = True
    return (np.cumsum(occurs) - 1)[tracks]
