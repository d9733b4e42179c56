"""What a tokenizer is and what it makes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

TokenKind = Literal["discrete", "continuous", "trajectory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Everything about a tokenizer that decides its tokens, apart from the frames.

    `codebook_size` is set for discrete tokens, `latent_dim` for the others. `stride_thw` is how many frames,
    rows and columns one token covers. `dtype` is the number type of the arithmetic, and
    `compiled` whether torch.compile orders it. `revision` rises with every change of our code that changes tokens.
    """

    name: str
    kind: TokenKind
    codebook_size: int | None
    latent_dim: int | None
    stride_thw: tuple[int, int, int]
    weights_sha256: str | None
    dtype: str
    compiled: bool = False
    revision: int = 1

    def __post_init__(self) -> None:
        if self.kind == "discrete" and (self.codebook_size is None or self.codebook_size < 2):
            raise ValueError(f"discrete tokens need a codebook of 2 or more: {self.codebook_size=}")
        if self.kind != "discrete" and (self.latent_dim is None or self.latent_dim < 1):
            raise ValueError(f"{self.kind} tokens need a positive latent_dim: {self.latent_dim=}")
        if min(self.stride_thw) < 1:
            raise ValueError(f"strides must be positive: {self.stride_thw=}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrid:
    """The tokens of one clip: codes (t,h,w) or latents (t,h,w,d), and how many of its frames are real."""

    values_thw: np.ndarray
    num_valid: int

    def __post_init__(self) -> None:
        if self.values_thw.ndim not in (3, 4):
            raise ValueError(f"a token grid is (t,h,w) or (t,h,w,d), found {self.values_thw.shape}")
        if self.num_valid < 1:
            raise ValueError(f"a clip has one real frame or more, found {self.num_valid=}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryTokens:
    """One token per object trajectory of a clip: `values_Nd`, of which those in `valid_N` stand for an object."""

    values_Nd: np.ndarray
    valid_N: np.ndarray

    def __post_init__(self) -> None:
        if self.values_Nd.ndim != 2:
            raise ValueError(f"trajectory tokens are (N,d), found {self.values_Nd.shape}")
        if self.valid_N.dtype != np.bool_ or self.valid_N.shape != self.values_Nd.shape[:1]:
            raise ValueError(f"valid_N must be bool (N,) beside {self.values_Nd.shape}: {self.valid_N.shape}")
