"""Resizing one frame to the size that tokenizers are given, always antialiased."""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..schemas.clip import Sampling

# Rises with every change of this file that changes pixels: it is part of every product's fingerprint.
RESIZE_REVISION = 1

Scale = Callable[[np.ndarray, int, int, str], np.ndarray]


def resize_frame(frame_HWC: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The uint8 RGB frame at the sampling's height and width; the frame itself where it has that size already.

    ``center_crop`` scales to cover the size and cuts the middle out, ``letterbox`` scales to fit and fills up
    with black, ``squash`` ignores the aspect ratio. Values are within one grey level of
    torch.nn.functional.interpolate(antialias=True) in float32, rounded.
    """
    if frame_HWC.shape[:2] == (sampling.height, sampling.width):
        return frame_HWC
    mode, interpolation = parse_resize(sampling.resize)
    return RESIZES[mode](frame_HWC, sampling.height, sampling.width, interpolation)


def parse_resize(resize: str) -> tuple[str, str]:
    """The two halves of ``<mode>/<interpolation>``; ValueError says which are accepted."""
    mode, _, interpolation = resize.partition("/")
    if mode not in RESIZES or interpolation not in SCALERS:
        raise ValueError(
            f"resize={resize!r} is unknown: accepted are <mode>/<interpolation> with a mode of"
            f" {', '.join(RESIZES)} and an interpolation of {', '.join(SCALERS)}"
        )
    return mode, interpolation


def _center_crop(frame_HWC: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    source_h, source_w, _ = frame_HWC.shape
    scale = max(height / source_h, width / source_w)
    cover_h, cover_w = max(height, _rounded(source_h * scale)), max(width, _rounded(source_w * scale))
    cover_HWC = _squash(frame_HWC, cover_h, cover_w, interpolation)
    top, left = (cover_h - height) // 2, (cover_w - width) // 2
    return cover_HWC[top : top + height, left : left + width]


def _letterbox(frame_HWC: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    source_h, source_w, _ = frame_HWC.shape
    scale = min(height / source_h, width / source_w)
    inner_h = min(height, max(1, _rounded(source_h * scale)))
    inner_w = min(width, max(1, _rounded(source_w * scale)))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    canvas_HWC = np.zeros((height, width, 3), np.uint8)
    canvas_HWC[top : top + inner_h, left : left + inner_w] = _squash(frame_HWC, inner_h, inner_w, interpolation)
    return canvas_HWC


def _squash(frame_HWC: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    # Channels last in memory, one image at a time: torch's quickest path, and no sum depends on neighbours.
    frame_1CHW = torch.from_numpy(np.ascontiguousarray(frame_HWC)).permute(2, 0, 1).unsqueeze(0)
    return SCALERS[interpolation](frame_1CHW, height, width)[0].permute(1, 2, 0).numpy()


def _bilinear(frame_1CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """In integers: the weights are positive, so rounding between the two passes costs one grey level at most."""
    return torch.nn.functional.interpolate(frame_1CHW, size=(height, width), mode="bilinear", antialias=True)


def _bicubic(frame_1CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """In float32: negative weights overshoot, and integers clamp that between the passes (14 levels on hard edges)."""
    scaled = torch.nn.functional.interpolate(frame_1CHW.float(), size=(height, width), mode="bicubic", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _rounded(size: float) -> int:
    """Half up: Python's round would go to the even neighbour."""
    return math.floor(size + 0.5)


RESIZES: dict[str, Scale] = {"center_crop": _center_crop, "squash": _squash, "letterbox": _letterbox}
SCALERS = {"bilinear": _bilinear, "bicubic": _bicubic}
