"""Parameters that are a pure function of their names and shapes, and clips of shapes that move: what the golden values
of tests/golden/trajtok were made from.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tokenmill.tokenizers.trajtok import build_segment_vit
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_towers import SegmentVit

GOLDEN = Path(__file__).parent.parent / "golden" / "trajtok"
# Everything is there, and little of it: the rules are the same.
TINY = Sizes(
    dim=64, num_slots=8, grid=14, level=2, vit_layers=2, vit_heads=4, vit_dim=64,
    depths=(1, 1, 2, 1), widths=(8, 16, 24, 32),
)  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parameter(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one tensor of the state dict."""
    leaf = key.rpartition(".")[2]
    if key.endswith("rotary_emb.freqs"):
        n = shape[0]
        return torch.from_numpy((10_000.0 ** (-np.arange(n) * 2.0 / (2.0 * n))).astype(np.float32))
    z = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode()))).standard_normal(shape)
    if leaf == "log_scale":
        z = math.log(16.0) + 0.1 * z
    elif leaf == "gamma":
        z = 0.25 + 0.05 * z
    elif leaf == "position_embeddings":
        z = 0.02 * z
    elif leaf in ("latents", "cls_token"):
        pass
    elif len(shape) <= 1:
        z = 1.0 + 0.1 * z if leaf == "weight" else 0.05 * z
    else:
        z /= math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def filled(model: nn.Module, prefix: str) -> nn.Module:
    """`model` with those values, for keys behind `prefix`; one made on the meta device is then on the CPU."""
    if any(value.is_meta for value in model.parameters()):
        model = model.to_empty(device="cpu")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(parameter(prefix + key, tuple(value.shape)))
    return model


def vit_of(sizes: Sizes) -> SegmentVit:
    """The model of these sizes with those values."""
    with torch.device("meta"):
        model = build_segment_vit(sizes)
    filled(model, "vision_encoder.")
    return model


def clip(num_frames: int, side: int, seed: int) -> torch.Tensor:
    """uint8 frames (T,H,W,3): five textured shapes that move over a textured background."""
    return clip_with_ids(num_frames, side, seed, 5)[0]


def clip_with_ids(num_frames: int, side: int, seed: int, num_objects: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with any number of shapes, and which of them (from 1) each pixel (T,H,W) shows; 0 is the background."""
    random = np.random.Generator(np.random.Philox(key=1000 + seed))
    y, x = np.mgrid[0:side, 0:side].astype(np.float64)
    waves = random.uniform(0.5, 2.0, 2) * 2 * np.pi / side
    colour = random.uniform(60, 160, 3)
    objects = [
        (
            int(random.integers(0, 2)),
            random.uniform(0.2, 0.8, 2) * side,
            random.uniform(-0.03, 0.03, 2) * side,
            random.uniform(0.08, 0.2) * side,
            random.uniform(20, 235, 3),
            random.uniform(4, 12),
            random.uniform(8, 25),
        )
        for _ in range(num_objects)
    ]
    frames = np.zeros((num_frames, side, side, 3))
    ids = np.zeros((num_frames, side, side), np.uint8)
    for t in range(num_frames):
        frames[t] = colour + (18 * np.sin(waves[0] * (x + 2 * t)) + 18 * np.cos(waves[1] * (y - t)))[..., None]
        for number, (kind, centre, speed, radius, own, frequency, height) in enumerate(objects, start=1):
            dy, dx = y - (centre[0] + speed[0] * t), x - (centre[1] + speed[1] * t)
            inside = np.maximum(abs(dy), abs(dx)) <= radius if kind else dy * dy + dx * dx <= radius**2
            texture = height * np.sin(2 * np.pi * frequency * (dx + dy) / side)
            frames[t][inside] = (own + texture[..., None])[inside]
            ids[t][inside] = number
    return torch.from_numpy(np.clip(np.rint(frames), 0, 255).astype(np.uint8)), torch.from_numpy(ids)


def normalized(frames_THWC: torch.Tensor) -> torch.Tensor:
    """float32 (1,T,H,W,3) by the mean and deviation of ImageNet."""
    return ((frames_THWC.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).unsqueeze(0)
