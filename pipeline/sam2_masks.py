"""Sets of masks: which proposals are good and distinct, which are the same object, and one label for each pixel."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

STABILITY_MARGIN = 1.0  # of logits, by which the border of a mask is moved outwards and inwards
PIXELS_AT_ONCE = 1 << 26  # of masks as floating point, in one piece: bounds the memory


def stability(logits_NHW: torch.Tensor) -> torch.Tensor:
    """How little (N,) each mask changes with its threshold: IoU of the masks at a logit of 1 and of -1, 1 if empty."""
    inner_N = areas(logits_NHW > STABILITY_MARGIN)
    outer_N = areas(logits_NHW > -STABILITY_MARGIN)
    return torch.where(outer_N > 0, inner_N / outer_N.clamp(min=1), 1.0)


def good_masks(
    logits_NHW: torch.Tensor,
    predicted_iou_N: torch.Tensor,
    *,
    least_iou: float,
    least_stability: float,
    least_area: float,
) -> torch.Tensor:
    """Which masks (N, bool) are predicted well enough, stable enough, and cover the share `least_area` of the frame."""
    num_pixels = least_pixels(logits_NHW.shape[1], logits_NHW.shape[2], least_area)
    large_N = areas(logits_NHW > 0) >= num_pixels
    return large_N & (predicted_iou_N >= least_iou) & (stability(logits_NHW) >= least_stability)


def areas(masks_NHW: torch.Tensor) -> torch.Tensor:
    """How many pixels (N) each mask has."""
    # torch sums booleans as copies of 8 bytes each.
    return torch.cat([part.sum(dim=(1, 2)) for part in masks_NHW.split(_at_once(8 * masks_NHW[:1].numel()))])


def least_pixels(height: int, width: int, area: float) -> int:
    """How many pixels the share `area` of a frame is: one or more."""
    return max(1, math.ceil(area * height * width))


def overlaps(a_NHW: torch.Tensor, b_MHW: torch.Tensor) -> torch.Tensor:
    """Intersection over union (N,M) of all pairs of boolean masks; 0 for two empty ones."""
    a_NP, b_MP = a_NHW.flatten(1), b_MHW.flatten(1)
    rows = []
    for a in a_NP.split(_at_once(a_NP.shape[1])):
        # Counts below 2^24 are exact in float32.
        rows.append(torch.cat([a.float() @ b.float().T for b in b_MP.split(_at_once(b_MP.shape[1]))], dim=1))
    common_NM = torch.cat(rows)
    either_NM = areas(a_NHW)[:, None] + areas(b_MHW)[None] - common_NM
    return common_NM / either_NM.clamp(min=1)


def distinct(masks_NHW: torch.Tensor, most_iou: float) -> torch.Tensor:
    """The indices of masks that overlap no earlier one of them by more than `most_iou` (non-maximum suppression)."""
    left_NN = (overlaps(masks_NHW, masks_NHW) <= most_iou).cpu().numpy()
    kept: list[int] = []
    open_N = np.ones(len(left_NN), bool)
    for i in range(len(left_NN)):
        if open_N[i]:
            kept.append(i)
            open_N &= left_NN[i]
    return torch.tensor(kept, dtype=torch.long, device=masks_NHW.device)


def painted(masks_NHW: torch.Tensor, labels: Sequence[int]) -> np.ndarray:
    """For every pixel (H,W, int32) the label of the smallest mask there, 0 where none is.

    Of equally small masks the last counts.
    """
    frame_HW = torch.zeros(masks_NHW.shape[1:], dtype=torch.int32, device=masks_NHW.device)
    for i in by_area(masks_NHW).tolist():
        frame_HW.masked_fill_(masks_NHW[i], labels[i])
    return frame_HW.cpu().numpy()


def by_area(masks_NHW: torch.Tensor) -> torch.Tensor:
    """The indices of the masks, the largest first; equally large ones in their order."""
    return torch.argsort(areas(masks_NHW), descending=True, stable=True)


def matched(before_NHW: torch.Tensor, found_MHW: torch.Tensor, least_iou: float) -> list[tuple[int, int]]:
    """Pairs of a mask and its successor with an IoU of `least_iou` or more, each in one pair at most.

    The pairs are those of the largest sum of IoUs (Hungarian matching), of those that are allowed.
    """
    if not len(before_NHW) or not len(found_MHW):
        return []
    iou_NM = overlaps(before_NHW, found_MHW).cpu().numpy()
    iou_NM[iou_NM < least_iou] = 0
    rows, columns = linear_sum_assignment(iou_NM, maximize=True)
    return [(int(n), int(m)) for n, m in zip(rows, columns, strict=True) if iou_NM[n, m] > 0]


def newcomers(
    found_NHW: torch.Tensor, known_MHW: torch.Tensor, *, room: int, least_share: float, num_pixels: int
) -> torch.Tensor:
    """The found masks that are new objects beside the known ones: at most `room`, the largest first.

    A new object has `num_pixels` or more, `least_share` of them where no known mask is. It must also show as many
    pixels once overlaps are resolved: what is left of a mask between finer ones is no object.
    """
    size_N, free_N = areas(found_NHW), areas(found_NHW & ~known_MHW.any(dim=0))
    order = by_area(found_NHW)
    found_NHW = found_NHW[order[((size_N >= num_pixels) & (free_N >= least_share * size_N))[order]]]
    frame_HW = painted(torch.cat([found_NHW, known_MHW]), [*range(1, 1 + len(found_NHW)), *[0] * len(known_MHW)])
    seen_N = np.bincount(frame_HW.ravel(), minlength=1 + len(found_NHW))[1:]
    return found_NHW[np.flatnonzero(seen_N >= num_pixels)[: max(0, room)]]


def at_size(logits_Nhw: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The boolean masks (N,H,W) of logits, scaled bilinearly to the size of a frame."""
    masks_NHW = logits_Nhw.new_empty((len(logits_Nhw), height, width), dtype=torch.bool)
    for i in range(0, len(logits_Nhw), _at_once(height * width)):
        part_1Nhw = logits_Nhw[None, i : i + _at_once(height * width)].float()
        masks_NHW[i : i + part_1Nhw.shape[1]] = scaled(part_1Nhw, height, width)[0] > 0
    return masks_NHW


def scaled(images_BCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images of floating point at another size, bilinearly and antialiased."""
    return functional.interpolate(
        images_BCHW, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )


def _at_once(num_pixels: int) -> int:
    """How many masks of so many pixels are taken in one piece."""
    return max(1, PIXELS_AT_ONCE // max(1, num_pixels))
