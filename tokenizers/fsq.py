"""Finite scalar quantisation: each channel is bounded and rounded to one of a few levels (Mentzer et al. 2023,
arXiv:2309.15505, equations 1 and 2; in the form of VidTok, where odd numbers of levels are not shifted).
"""

import math
from collections.abc import Sequence

import torch

EPS = 1e-3  # how far the bounds lie outside of the outermost levels


class Fsq:
    """A codebook without parameters: every combination of `levels`, the first channel the lowest digit of the code."""

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"every channel needs two levels or more: {levels=}")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(self.levels)
        if self.codebook_size > 2**31:
            raise ValueError(f"codes are int32, {levels=} give {self.codebook_size}")

    def quantize(self, latents_Xd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The values (...,d) in [-1,1] that latents (...,d) are rounded to, in their dtype, and int32 codes (...)."""
        steps_Xd = self.bound(latents_Xd).round()
        half_d = self._halves(latents_Xd.device)
        values_Xd = (steps_Xd / half_d).to(latents_Xd.dtype)
        return values_Xd, self.codes((steps_Xd + half_d).to(torch.int32))

    def bound(self, latents_Xd: torch.Tensor) -> torch.Tensor:
        """Latents (...,d) in steps between levels, float32, before they are rounded."""
        levels_d = torch.tensor(self.levels, device=latents_Xd.device)
        reach_d = (levels_d - 1) * (1 + EPS) / 2
        offset_d = (levels_d % 2 == 0) * 0.5
        shift_d = (offset_d / reach_d).atanh()
        return (latents_Xd.float() + shift_d).tanh() * reach_d - offset_d

    def margins(self, latents_Xd: torch.Tensor) -> torch.Tensor:
        """How far (...) each vector is from another code, in steps: arithmetic that differs by less gives the same."""
        bounded_Xd = self.bound(latents_Xd)
        return (bounded_Xd - bounded_Xd.floor() - 0.5).abs().amin(-1)

    def codes(self, digits_Xd: torch.Tensor) -> torch.Tensor:
        """int32 codes (...) of digits (...,d), each from 0 to its level - 1."""
        basis_d = torch.tensor(self._basis(), dtype=torch.int32, device=digits_Xd.device)
        return (digits_Xd.to(torch.int32) * basis_d).sum(-1, dtype=torch.int32)

    def digits(self, codes_X: torch.Tensor) -> torch.Tensor:
        """int32 digits (...,d) of codes (...)."""
        device = codes_X.device
        basis_d = torch.tensor(self._basis(), dtype=torch.int32, device=device)
        levels_d = torch.tensor(self.levels, dtype=torch.int32, device=device)
        return (codes_X.to(torch.int32).unsqueeze(-1) // basis_d) % levels_d

    def values(self, codes_X: torch.Tensor) -> torch.Tensor:
        """The float32 values (...,d) that codes (...) stand for."""
        half_d = self._halves(codes_X.device)
        return (self.digits(codes_X) - half_d) / half_d

    def _halves(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([level // 2 for level in self.levels], dtype=torch.float32, device=device)

    def _basis(self) -> list[int]:
        """What one step of each digit adds to the code."""
        return [math.prod(self.levels[:i]) for i in range(len(self.levels))]
