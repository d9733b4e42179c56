"""What a tokenizer is and what it makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

TokenKind = Literal["discrete", "continuous", "trajectory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Everything about a tokenizer that decides its tokens, apart from the frames.

    `codebook_size` is set for discrete tokens (that of each level, where they come in levels), `latent_dim` for the
    others. `stride_thw` is how many frames, rows and columns one token covers (of levels: one of the coarsest).
    `dtype` is the number type of the arithmetic, and `compiled` whether torch.compile orders it. `options` are the
    settings that its family alone knows, by name, as JSON has them. `revision` rises with every change of our code that
    changes tokens.
    """

    name: str
    kind: TokenKind
    codebook_size: int | None
    latent_dim: int | None
    stride_thw: tuple[int, int, int]
    weights_sha256: str | None
    dtype: str
    compiled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 1

    def __post_init__(self) -> None:
        if self.kind == "discrete" and (self.codebook_size is None or self.codebook_size < 2):
            raise ValueError(f"discrete tokens need a codebook of 2 or more: {self.codebook_size=}")
        if self.kind != "discrete" and (self.latent_dim is None or self.latent_dim < 1):
            raise ValueError(f"{self.kind} tokens need a positive latent_dim: {self.latent_dim=}")
        if min(self.stride_thw) < 1:
            raise ValueError(f"strides must be positive: {self.stride_thw=}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec:
    """What a tokenizer gives of a whole clip: `dim` numbers of length 1, near to those of clips and texts alike.

    `options` are what decides them beside what decides the tokens.
    """

    dim: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrid:
    """The tokens of one clip, and how many of its frames are real.

    Codes are (t,h,w), those of levels (t,h,w,L), or (n,) on grids of their own; latents are (t,h,w,d).
    """

    values_thw: np.ndarray
    num_valid: int

    def __post_init__(self) -> None:
        if self.values_thw.ndim not in (1, 3, 4):
            raise ValueError(f"a token grid is (t,h,w), (t,h,w,d) or (n,), found {self.values_thw.shape}")
        if self.num_valid < 1:
            raise ValueError(f"a clip has one real frame or more, found {self.num_valid=}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryTokens:
    """One token, or a few, per object trajectory of a clip: `values_Nd` of the slots that stand for one.

    `slots_N` names the slot of each row, in rising order within its chunk, `chunks_N` the part of the clip (from 0; all
    have `chunk_frames` frames, the last one perhaps fewer), and `trajectories_N` the trajectory of the clip (from 0),
    which may go on in the next chunk under another slot.
    `assignment_Thw` (uint8) is the slot that each patch of each frame belongs to. `mass_N`, where it was asked for, is
    how many patches each slot has by soft shares. The first `num_valid` frames are real.
    """

    values_Nd: np.ndarray
    slots_N: np.ndarray
    chunks_N: np.ndarray
    trajectories_N: np.ndarray
    assignment_Thw: np.ndarray
    chunk_frames: int
    num_valid: int
    mass_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.values_Nd.ndim != 2:
            raise ValueError(f"trajectory tokens are (N,d), found {self.values_Nd.shape}")
        of_rows = {"slots_N": self.slots_N, "chunks_N": self.chunks_N, "trajectories_N": self.trajectories_N}
        for name, array in of_rows.items():
            if array.shape != self.values_Nd.shape[:1]:
                raise ValueError(f"{name} must be (N,) beside tokens {self.values_Nd.shape}, found {array.shape}")
        if self.assignment_Thw.dtype != np.uint8 or self.assignment_Thw.ndim != 3:
            found = self.assignment_Thw
            raise ValueError(f"an assignment is (T,h,w) uint8, found {found.dtype} {found.shape}")

    @property
    def tracks_Thw(self) -> np.ndarray:
        """For every patch its trajectory as 1 + its number (int32), 0 where its slot has no token."""
        chunk_of_T = np.arange(len(self.assignment_Thw)) // self.chunk_frames
        trajectory_of = np.zeros((int(chunk_of_T[-1]) + 1, 256), np.int32)
        trajectory_of[self.chunks_N, self.slots_N] = 1 + self.trajectories_N
        return trajectory_of[chunk_of_T[:, None, None], self.assignment_Thw]
