"""How near a reconstruction is to its source."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

HIGHEST_PSNR = 100.0  # of frames that are equal, where a mean is taken
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
LPIPS_SIDE = 16  # pixels that its five scales need
LPIPS_PREFIX = "loss.perceptual_loss."  # where VidTok's checkpoints have these networks
# The convolutions of VGG-16 whose outputs are compared, by slice: the last one of each, after its ReLU.
VGG_SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# What LPIPS subtracts from and divides [-1,1] by.
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def psnr(source: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite where they are equal."""
    error = np.mean((source.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def mean_psnr(source_THWC: np.ndarray, decoded_THWC: np.ndarray) -> float:
    """The mean over frames of their PSNR in dB, equal ones counted as HIGHEST_PSNR."""
    pairs = zip(source_THWC, decoded_THWC, strict=True)
    return float(np.mean([min(HIGHEST_PSNR, psnr(source, decoded)) for source, decoded in pairs]))


def mean_ssim(source_THWC: np.ndarray, decoded_THWC: np.ndarray) -> float:
    """The mean structural similarity of uint8 frames: a Gaussian window of 11x11, each channel by itself, where the
    window lies inside the frame (Wang et al. 2004, equation 13).
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    line /= line.sum()

    def smooth(images_N1HW: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(images_N1HW, line.reshape(1, 1, -1, 1)), line.reshape(1, 1, 1, -1))

    means = []
    for frames in zip(source_THWC, decoded_THWC, strict=True):
        x, y = (torch.from_numpy(frame).movedim(-1, 0).unsqueeze(1).double() / 255 for frame in frames)
        mean_x, mean_y = smooth(x), smooth(y)
        var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
        covariance = smooth(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        means.append((similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item())
    return float(np.mean(means))


class Lpips:
    """Learned perceptual distance by VGG-16 (Zhang et al. 2018, arXiv:1801.03924, equation 1).

    `tensors` are those of a VidTok checkpoint, with or without LPIPS_PREFIX; KeyError names one that is missing.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        found = {name.removeprefix(LPIPS_PREFIX): value.float() for name, value in tensors.items()}
        self._slices = [
            [(found[f"net.slice{i}.{n}.weight"], found[f"net.slice{i}.{n}.bias"]) for n in numbers]
            for i, numbers in enumerate(VGG_SLICES, start=1)
        ]
        self._weights = [found[f"lin{i}.model.1.weight"] for i in range(len(VGG_SLICES))]
        shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (LPIPS_SHIFT, LPIPS_SCALE))
        self._shift = found.get("scaling_layer.shift", shift)
        self._scale = found.get("scaling_layer.scale", scale)

    @torch.inference_mode()
    def mean_distance(self, source_THWC: np.ndarray, decoded_THWC: np.ndarray) -> float:
        """The mean over uint8 frames of their distance; 0 where they are equal."""
        pairs = zip(source_THWC, decoded_THWC, strict=True)
        return float(np.mean([self._distance(source, decoded) for source, decoded in pairs]))

    def _distance(self, source_HWC: np.ndarray, decoded_HWC: np.ndarray) -> float:
        images_NCHW = torch.from_numpy(np.stack((source_HWC, decoded_HWC))).movedim(-1, 1).float() / 127.5 - 1
        h = (images_NCHW - self._shift) / self._scale
        distance = 0.0
        for i, (convs, weight) in enumerate(zip(self._slices, self._weights, strict=True)):
            h = F.max_pool2d(h, 2) if i else h
            for kernel, bias in convs:
                h = F.relu(F.conv2d(h, kernel, bias, padding=1))
            units = h / (h.norm(dim=1, keepdim=True) + 1e-10)
            distance += F.conv2d((units[:1] - units[1:]) ** 2, weight).mean().item()
        return distance
