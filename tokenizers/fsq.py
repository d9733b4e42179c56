"""Finite scalar quantisation: each channel is bounded and rounded to one of a few levels (Mentzer et al. 2023,
arXiv:2309.15505, equations 1 and 2; in the form of VidTok, where odd numbers of levels are not shifted).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
        half_d = _constants(self.levels, latents_Xd.device).half_d
        values_Xd = (steps_Xd / half_d).to(latents_Xd.dtype)
        return values_Xd, self.codes((steps_Xd + half_d).to(torch.int32))

    def bound(self, latents_Xd: torch.Tensor) -> torch.Tensor:
        """Latents (...,d) in steps between levels, float32, before they are rounded."""
        c = _constants(self.levels, latents_Xd.device)
        return (latents_Xd.float() + c.shift_d).tanh() * c.reach_d - c.offset_d

    def margins(self, latents_Xd: torch.Tensor) -> torch.Tensor:
        """How far (...) each vector is from another code, in steps: arithmetic that differs by less gives the same."""
        bounded_Xd = self.bound(latents_Xd)
        return (bounded_Xd - bounded_Xd.floor() - 0.5).abs().amin(-1)

    def codes(self, digits_Xd: torch.Tensor) -> torch.Tensor:
        """int32 codes (...) of digits (...,d), each from 0 to its level - 1."""
        basis_d = _constants(self.levels, digits_Xd.device).basis_d
        return (digits_Xd.to(torch.int32) * basis_d).sum(-1, dtype=torch.int32)

    def digits(self, codes_X: torch.Tensor) -> torch.Tensor:
        """int32 digits (...,d) of codes (...)."""
        c = _constants(self.levels, codes_X.device)
        return (codes_X.to(torch.int32).unsqueeze(-1) // c.basis_d) % c.levels_d

    def values(self, codes_X: torch.Tensor) -> torch.Tensor:
        """The float32 values (...,d) that codes (...) stand for."""
        half_d = _constants(self.levels, codes_X.device).half_d
        return (self.digits(codes_X) - half_d) / half_d


@dataclass(frozen=True, slots=True, kw_only=True)
class _Constants:
    """What follows from the levels, a number for each channel."""

    levels_d: torch.Tensor
    basis_d: torch.Tensor  # what one step of a digit adds to the code
    half_d: torch.Tensor  # steps between zero and the lowest level
    reach_d: torch.Tensor
    offset_d: torch.Tensor
    shift_d: torch.Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _constants(levels: tuple[int, ...], device: torch.device) -> _Constants:
    """Made once for a device: each copy to a GPU would wait for all its work."""
    levels_d = torch.tensor(levels, dtype=torch.int32, device=device)
    reach_d = (levels_d - 1) * (1 + EPS) / 2
    offset_d = (levels_d % 2 == 0) * 0.5
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    return _Constants(
        levels_d=levels_d,
        basis_d=torch.tensor(basis, dtype=torch.int32, device=device),
        half_d=(levels_d // 2).float(),
        reach_d=reach_d,
        offset_d=offset_d,
        shift_d=(offset_d / reach_d).atanh(),
    )
