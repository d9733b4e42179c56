"""Resizing one frame to the size that tokenizers are given, always antialiased."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..schemas.clip import Sampling

# Rises with every change of this file that changes pixels: it is part of every product's fingerprint.
RESIZE_REVISION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The height and width that a picture is scaled to, and the row and column of the frame that its corner lies at.

    Where the corner is negative, what lies outside the frame is cut away; what the picture does not cover is black.
    """

    height: int
    width: int
    top: int
    left: int


def resize_frame(frame_HWC: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The uint8 RGB frame at the sampling's height and width; the frame itself where it has that size already.

    ``center_crop`` scales to cover the size and cuts the middle out, ``letterbox`` scales to fit and fills up
    with black, ``squash`` ignores the aspect ratio. Values are within one grey level of
    torch.nn.functional.interpolate(antialias=True) in float32, rounded.
    """
    height, width = sampling.height, sampling.width
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    _, interpolation = parse_resize(sampling.resize)
    place = place_of(frame_HWC.shape[0], frame_HWC.shape[1], sampling)
    scaled_HWC = _scaled(frame_HWC, place.height, place.width, interpolation)
    top, left = max(0, -place.top), max(0, -place.left)
    shown_HWC = scaled_HWC[top : top + height, left : left + width]
    shown_h, shown_w, _ = shown_HWC.shape
    if (shown_h, shown_w) == (height, width):
        return shown_HWC
    canvas_HWC = np.zeros((height, width, 3), np.uint8)
    canvas_HWC[place.top : place.top + shown_h, place.left : place.left + shown_w] = shown_HWC
    return canvas_HWC


def place_of(source_h: int, source_w: int, sampling: Sampling) -> Place:
    """Where a picture of this size comes to lie in the frames of clips."""
    mode, _ = parse_resize(sampling.resize)
    return RESIZES[mode](source_h, source_w, sampling.height, sampling.width)


def parse_resize(resize: str) -> tuple[str, str]:
    """The two halves of ``<mode>/<interpolation>``; ValueError says which are accepted."""
    mode, _, interpolation = resize.partition("/")
    if mode not in RESIZES or interpolation not in SCALERS:
        raise ValueError(
            f"resize={resize!r} is unknown: accepted are <mode>/<interpolation> with a mode of"
            f" {', '.join(RESIZES)} and an interpolation of {', '.join(SCALERS)}"
        )
    return mode, interpolation


def _center_crop(source_h: int, source_w: int, height: int, width: int) -> Place:
    scale = max(height / source_h, width / source_w)
    cover_h, cover_w = max(height, _rounded(source_h * scale)), max(width, _rounded(source_w * scale))
    return Place(height=cover_h, width=cover_w, top=-((cover_h - height) // 2), left=-((cover_w - width) // 2))


def _letterbox(source_h: int, source_w: int, height: int, width: int) -> Place:
    scale = min(height / source_h, width / source_w)
    inner_h = min(height, max(1, _rounded(source_h * scale)))
    inner_w = min(width, max(1, _rounded(source_w * scale)))
    return Place(height=inner_h, width=inner_w, top=(height - inner_h) // 2, left=(width - inner_w) // 2)


def _squash(_source_h: int, _source_w: int, height: int, width: int) -> Place:
    return Place(height=height, width=width, top=0, left=0)


def _scaled(frame_HWC: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
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


RESIZES: dict[str, Callable[[int, int, int, int], Place]] = {
    "center_crop": _center_crop,
    "squash": _squash,
    "letterbox": _letterbox,
}
SCALERS = {"bilinear": _bilinear, "bicubic": _bicubic}
