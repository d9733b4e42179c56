"""Scores of frames without a query and without weights: how much moves, how unlike the others, how sharp, and shots."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from .key_frames import CUT_CHANGE, change_between, changes_between, cuts_among, look_of, mean_look

SMALL = 64  # pixels of the side of the squares that movement is seen in
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
FRAME_SCORES_REVISION = 1  # rises with every change of this file, or of key_frames, that changes scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameScores:
    """Scores of the T frames of a clip, each of these arrays (T,).

    `motion`: mean absolute difference of small grey pictures to the frame before, from 0 to 1. `novelty`: how far the
    frame's colours and layout are from the mean of the clip, from 0 to 1. `sharpness`: the variance of the Laplacian
    of the grey picture with values from 0 to 1 (Pech-Pacheco et al. 2000). `shot_change`: how much colours and layout
    differ from the frame before, from 0 to 1; `is_shot_start` where that is large and stands out. The first frame of a
    clip is compared with nothing: 0.
    """

    motion: np.ndarray
    novelty: np.ndarray
    sharpness: np.ndarray
    shot_change: np.ndarray
    is_shot_start: np.ndarray


def score_frames(frames_THWC: np.ndarray) -> FrameScores:
    """The scores of all uint8 RGB frames of a clip, in their order."""
    looks = [look_of(frame_HWC) for frame_HWC in frames_THWC]
    mean, shot_change_T = mean_look(looks), changes_between(looks)
    is_shot_start_T = np.zeros(len(frames_THWC), bool)
    is_shot_start_T[cuts_among(shot_change_T, CUT_CHANGE)] = True
    motion, sharpness, before = [], [], None
    for frame_HWC in frames_THWC:
        grey_11HW = _grey(frame_HWC)
        small_11hw = functional.adaptive_avg_pool2d(grey_11HW, SMALL)
        motion.append(0.0 if before is None else float((small_11hw - before).abs().mean()))
        sharpness.append(_laplacian_variance(grey_11HW))
        before = small_11hw
    return FrameScores(
        motion=np.array(motion),
        novelty=np.array([change_between(look, mean) for look in looks]),
        sharpness=np.array(sharpness),
        shot_change=shot_change_T,
        is_shot_start=is_shot_start_T,
    )


def _grey(frame_HWC: np.ndarray) -> torch.Tensor:
    """(1,1,H,W) with values from 0 to 1."""
    grey_HW = torch.tensor(np.ascontiguousarray(frame_HWC)).float() @ torch.tensor(GREY)
    return grey_HW[None, None] / 255


def _laplacian_variance(grey_11HW: torch.Tensor) -> float:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    padded = functional.pad(grey_11HW, (1, 1, 1, 1), mode="replicate")
    return float(functional.conv2d(padded, kernel).var(correction=0))
