"""PyraTok on a GPU: levels begin, a step is learned, and a batch has the codes of its clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenmill.tokenizers.base import LevelTokenizer, joined_levels
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.pyratok_losses import PyramidTraining
from tokenmill.tokenizers.pyratok_pyramid import PyramidSizes, build_pyramid, save_pyramid
from tokenmill.tokenizers.pyratok_vae import VaeSizes, draw_weights

pytestmark = pytest.mark.gpu
SIZES = VaeSizes(base_dim=16, z_dim=16, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True))


def test_a_pyramid_learns_encodes_and_decodes_there(tmp_path: Path) -> None:
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 9, 32, 32, 3), np.uint8))
    x_BCTHW = clips.movedim(-1, 1).cuda()
    model = build_pyramid(SIZES, PyramidSizes())
    draw_weights(model, 0)
    training = PyramidTraining(model).cuda()
    training.begin_levels(list(x_BCTHW.split(1)), normalized=True)
    terms = training(x_BCTHW, ["a", "b", None, "c"], torch.Generator().manual_seed(0))
    training.total(terms).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(level.proj.weight.grad.any() for level in model.levels)  # pyright: ignore[reportOptionalMemberAccess]
    path = str(tmp_path / "model.safetensors")
    save_pyramid(model, path)
    near, there = (
        load_tokenizer("pyratok/pyramid", path, device, options={"text": "a red ball"}) for device in ("cpu", "cuda")
    )
    assert isinstance(near, LevelTokenizer)
    assert isinstance(there, LevelTokenizer)
    codes = joined_levels(there.encode(clips))
    assert (codes.cpu() == joined_levels(near.encode(clips))).float().mean() > 0.99
    assert there.decode(codes, 9).shape == clips.shape
