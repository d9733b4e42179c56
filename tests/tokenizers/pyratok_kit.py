"""Parameters and inputs that are a pure function of their names and shapes: what the golden values of
tests/golden/pyratok were made from.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tokenmill.tokenizers.pyratok_quantizer import ResidualSignQuantizer

GOLDEN = Path(__file__).parent.parent / "golden" / "pyratok"
CASES: dict[str, Any] = json.loads((GOLDEN / "keys.json").read_text())["cases"]
FIXED = ("bitmask", "codebook")
TINY = {name: value for name, value in CASES["wan_tiny"]["wan_cfg"].items()}


def draw(key: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Normal values for an input of this name."""
    normal = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode()))).standard_normal(shape)
    return torch.from_numpy(np.float32(scale) * normal.astype(np.float32))


def parameter(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one tensor of the state dict."""
    normal = draw(key, shape).numpy()
    if key.endswith("gamma") or (len(shape) < 2 and key.endswith("weight")):
        normal = np.float32(1) + np.float32(0.1) * normal
    elif len(shape) < 2:
        normal = np.float32(0.1) * normal
    else:
        normal = normal / np.float32(np.sqrt(int(np.prod(shape[1:]))))
    return torch.from_numpy(np.ascontiguousarray(normal, dtype=np.float32))


def filled(model: nn.Module, prefix: str) -> Any:
    """`model` with those values, for keys behind `prefix`."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not key.endswith(FIXED):
                value.copy_(parameter(prefix + key, tuple(value.shape)))
    return model


def golden(case: str) -> dict[str, torch.Tensor]:
    """The golden values of a case by name."""
    values = np.load(GOLDEN / "golden.npz")
    return {key.partition("/")[2]: torch.from_numpy(values[key]) for key in values.files if key.startswith(f"{case}/")}


def quantizer_of(cfg: dict[str, Any]) -> ResidualSignQuantizer:
    """A quantizer by the names that the published constructor gives its arguments."""
    own = ("text_embed_dim", "commitment_weight", "entropy_weight", "inv_temperature")
    return ResidualSignQuantizer(
        cfg["codebook_dim"],
        cfg["num_quantizers"],
        text_condition_heads=cfg["text_condition_heads"] or 1,
        **{name: cfg[name] for name in own if name in cfg},
    )


def certain(margins_BthwQ: torch.Tensor) -> torch.Tensor:
    """Where no sign of a stage or of those before it hangs on rounding."""
    return (margins_BthwQ > 1e-4).cumprod(-1).bool()
