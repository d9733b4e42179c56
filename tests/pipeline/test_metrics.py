"""Figures of quality are those of the field."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenmill.pipeline.metrics import VGG_SLICES, Lpips, mean_psnr, mean_ssim

RANDOM = np.random.default_rng(7)
SOURCE = RANDOM.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
NEAR = np.clip(SOURCE + RANDOM.normal(0, 9, SOURCE.shape), 0, 255).astype(np.uint8)


def test_psnr_is_the_mean_over_frames() -> None:
    wanted = np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(SOURCE, NEAR, strict=True)])
    assert mean_psnr(SOURCE, NEAR) == pytest.approx(wanted)
    assert mean_psnr(SOURCE, SOURCE) == 100


def test_ssim_is_the_published_one() -> None:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    wanted = np.mean([structural_similarity(a, b, **options) for a, b in zip(SOURCE, NEAR, strict=True)])
    assert mean_ssim(SOURCE, NEAR) == pytest.approx(wanted, abs=1e-9)
    assert mean_ssim(SOURCE, SOURCE) == pytest.approx(1)


def lpips_tensors() -> dict[str, torch.Tensor]:
    """Networks of random weights with the names and shapes of a VidTok checkpoint."""
    made, width = {}, 3
    generator = torch.Generator().manual_seed(1)
    for i, (numbers, channels) in enumerate(zip(VGG_SLICES, (64, 128, 256, 512, 512), strict=True), start=1):
        for number in numbers:
            made[f"net.slice{i}.{number}.weight"] = torch.randn(channels, width, 3, 3, generator=generator) * 0.05
            made[f"net.slice{i}.{number}.bias"] = torch.randn(channels, generator=generator) * 0.05
            width = channels
        made[f"lin{i - 1}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return {f"loss.perceptual_loss.{name}": value for name, value in made.items()}


def test_lpips_grows_with_the_difference() -> None:
    distance = Lpips(lpips_tensors())
    assert distance.mean_distance(SOURCE, SOURCE) == 0
    near = distance.mean_distance(SOURCE, NEAR)
    assert 0 < near < distance.mean_distance(SOURCE, 255 - SOURCE)
    assert near == pytest.approx(distance.mean_distance(NEAR, SOURCE))
    assert near == pytest.approx(
        np.mean([distance.mean_distance(SOURCE[i : i + 1], NEAR[i : i + 1]) for i in range(3)])
    )


def test_lpips_without_one_of_its_tensors_names_it() -> None:
    tensors = lpips_tensors()
    del tensors["loss.perceptual_loss.lin3.model.1.weight"]
    with pytest.raises(KeyError, match=r"lin3.model.1.weight"):
        Lpips(tensors)
