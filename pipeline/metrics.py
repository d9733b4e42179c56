"""How near a reconstruction is to its source."""

import numpy as np


def psnr(source: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite where they are equal."""
    error = np.mean((source.astype(np.float64) - decoded.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
