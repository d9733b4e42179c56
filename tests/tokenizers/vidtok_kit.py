"""Parameters that are a pure function of their names and shapes, clips that are one of their size: what the golden
values of tests/golden/vidtok were made from.
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).parent.parent / "golden" / "vidtok"


def parameter(key: str, shape: torch.Size) -> torch.Tensor:
    """The value of one tensor of the state dict."""
    words = np.random.Philox(key=zlib.crc32(key.encode())).random_raw(shape.numel())
    uniform = ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)).reshape(shape)
    if key.endswith("mix_factor"):
        values = uniform * np.float32(1.5)
    elif len(shape) <= 1:
        values = np.float32(0.1) * uniform + np.float32(key.endswith(".weight"))
    else:
        gain = 3.0 if ".conv_out." in key else 1.0
        values = uniform * np.float32(gain * (3.0 / np.prod(shape[1:])) ** 0.5)
    return torch.from_numpy(np.ascontiguousarray(values))


def filled(model: nn.Module) -> nn.Module:
    """`model` with those values."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(parameter(key, value.shape))
    return model


def clip(num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 frames (T,H,W,3): a moving pattern of integers with a little noise."""
    shape = (num_frames, height, width, 3)
    t, y, x, c = np.meshgrid(*map(np.arange, shape), indexing="ij")
    tile = ((y + 2 * t + 5 * seed) // 8) ^ ((x + 3 * t) // 8)
    wave = np.abs((3 * y + 5 * x + 7 * t + 37 * c + 23 * tile + 11 * seed) % 510 - 255)
    noise = (np.random.Philox(key=1000 + seed).random_raw(wave.size) >> np.uint64(59)).astype(np.int64) - 16
    return torch.from_numpy(np.clip(wave + noise.reshape(shape), 0, 255).astype(np.uint8))


def normalized(frames_THWC: torch.Tensor) -> torch.Tensor:
    """float32 (1,3,T,H,W) in [-1,1]."""
    return ((frames_THWC.float() / 255 - 0.5) / 0.5).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
