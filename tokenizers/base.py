"""What every tokenizer offers, and a small one for tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from ..schemas.errors import TokenizerError
from ..schemas.tokens import EmbeddingSpec, TokenizerSpec

Levels = torch.Tensor | Sequence[torch.Tensor]

NO_CODE = -1  # in place of the code of a latent that is not a number: such tokens are never stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a tokenizer is to be made: see `load_tokenizer`."""

    weights: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    logvar: bool = False
    compiled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """Tokens of the trajectories of B clips, N to each: those of all slots, in all chunks of the clip, in this order.

    `values_BNd` are latents of the spec's dtype, of which those in `valid_BN` (bool) stand for a trajectory.
    `slots_N` is the slot of each row, `chunks_N` the part of the clip (from 0), both int16; `trajectories_BN` (int16)
    numbers trajectories of the clip over its chunks, from 0 in the order of their first row, -1 where not valid. A
    chunk has `chunk_frames` frames, the last one perhaps fewer.
    `assignment_BThw` (uint8) is the slot of every patch. `mass_BN` (float32), where asked for, is how many patches each
    slot has by soft shares. `embedding_BCE` (float32, of length 1), where asked for, is each chunk in the space of
    texts.
    """

    values_BNd: torch.Tensor
    valid_BN: torch.Tensor
    slots_N: torch.Tensor
    chunks_N: torch.Tensor
    trajectories_BN: torch.Tensor
    assignment_BThw: torch.Tensor
    chunk_frames: int
    mass_BN: torch.Tensor | None = None
    embedding_BCE: torch.Tensor | None = None


@runtime_checkable
class TrajectoryTokenizer(Protocol):
    """Turns frames into one token, or a few, for each trajectory. There is no way back to frames."""

    @property
    def spec(self) -> TokenizerSpec:
        """What decides the tokens, apart from the frames; `stride_thw` is the size of a patch."""
        ...

    @property
    def is_batched(self) -> bool:
        """As of VideoTokenizer."""
        ...

    @property
    def embedding(self) -> EmbeddingSpec | None:
        """What `encode` gives of whole clips; None where that was not asked for."""
        ...

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (T,h,w) of the assignment of a clip of this size; TokenizerError says which sizes are accepted."""
        ...

    def encode(self, frames_BTHWC: torch.Tensor) -> TrajectoryBatch:
        """The tokens of uint8 RGB frames."""
        ...


class VideoTokenizer(Protocol):
    """Turns frames into tokens and back. Holds the weights, if it has any."""

    @property
    def spec(self) -> TokenizerSpec:
        """What decides the tokens, apart from the frames."""
        ...

    @property
    def is_batched(self) -> bool:
        """Whether clips that come together are computed together: sums then depend on how many they are."""
        ...

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (t,h,w) grid of a clip of this size; TokenizerError says which sizes are accepted."""
        ...

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """uint8 RGB frames to int32 codes (B,t,h,w), or to latents (B,t,h,w,d) of the spec's dtype."""
        ...

    def margins(self, frames_BTHWC: torch.Tensor) -> torch.Tensor | None:
        """How far (B,t,h,w) each code of these frames was from being another, in steps between levels.

        None where there are no codes, or where they are exact on every machine.
        """
        ...

    def decode(self, tokens: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """Tokens as `encode` gives them to uint8 RGB frames (B,T,H,W,3), of clips that had `num_frames`.

        None stands for as many frames as clips with such a grid have at most.
        """
        ...


@runtime_checkable
class LevelTokenizer(Protocol):
    """Turns frames into codes that come in levels, of which the first few decode too, with less detail.

    Levels are int32 codes (B,t,h,w,L) where all lie on one grid, and L tensors (B,t,h,w) where each has its own.
    """

    @property
    def spec(self) -> TokenizerSpec:
        """What decides the tokens, apart from the frames; `codebook_size` is that of every level."""
        ...

    @property
    def is_batched(self) -> bool:
        """As of VideoTokenizer."""
        ...

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """The (t,h,w) grid of every level of a clip of this size; TokenizerError says which sizes are accepted."""
        ...

    def encode(self, frames_BTHWC: torch.Tensor) -> Levels:
        """The codes of uint8 RGB frames."""
        ...

    def margins(self, frames_BTHWC: torch.Tensor) -> Levels:
        """How far each code of these frames was from being another, as `encode` gives codes."""
        ...

    def decode(self, tokens: Levels, num_frames: int | None = None) -> torch.Tensor:
        """All levels, or the first few, to uint8 RGB frames (B,T,H,W,3), of clips that had `num_frames`."""
        ...


AnyTokenizer = VideoTokenizer | LevelTokenizer | TrajectoryTokenizer


def joined_levels(tokens: Levels) -> torch.Tensor:
    """Levels as one tensor: (B,t,h,w,L) as it is, grids of their own as (B,n), one level after the other."""
    if isinstance(tokens, torch.Tensor):
        return tokens
    return torch.cat([level_Bthw.flatten(1) for level_Bthw in tokens], dim=1)


def grid_of(num_frames: int, height: int, width: int, spec: TokenizerSpec) -> tuple[int, int, int]:
    """The (t,h,w) grid for sizes that `spec.stride_thw` divides; TokenizerError for others."""
    sizes = dict(zip(("num_frames", "height", "width"), (num_frames, height, width), strict=True))
    for (key, size), stride in zip(sizes.items(), spec.stride_thw, strict=True):
        check_multiple(key, size, stride, spec.name)
    t, h, w = (size // stride for size, stride in zip(sizes.values(), spec.stride_thw, strict=True))
    return t, h, w


def check_multiple(key: str, size: int, stride: int, name: str) -> None:
    """TokenizerError unless `stride` divides the `size` of clips."""
    if size < stride or size % stride:
        near = max(stride, round(size / stride) * stride)
        raise TokenizerError(
            f"{name} takes clips whose {key} is a multiple of {stride}, found {size}: set clips.{key}={near}"
        )


def check_frames(frames_BTHWC: torch.Tensor, name: str) -> None:
    """TokenizerError unless these are uint8 RGB frames (B,T,H,W,3)."""
    shape = tuple(frames_BTHWC.shape)
    if frames_BTHWC.dtype != torch.uint8 or len(shape) != 5 or shape[4] != 3:
        raise TokenizerError(
            f"{name} encodes uint8 RGB frames of shape (B,T,H,W,3), found {frames_BTHWC.dtype} of shape {shape}:"
            f" convert them"
        )


def check_latents(tokens: torch.Tensor, latent_dim: int, name: str) -> None:
    """TokenizerError unless these are latents (B,t,h,w,d) of that dimension."""
    if not tokens.is_floating_point() or tokens.ndim != 5 or tokens.shape[4] != latent_dim or 0 in tokens.shape[1:]:
        raise TokenizerError(
            f"{name} decodes latents of shape (B,t,h,w,{latent_dim}), found {tokens.dtype} of shape"
            f" {tuple(tokens.shape)}: pass them as encode returns them"
        )


def check_length(num_frames: int | None, found: int, name: str) -> None:
    """TokenizerError unless clips of `num_frames`, where that is given, have tokens as `found` frames have."""
    if num_frames not in (None, found):
        raise TokenizerError(
            f"{name}: these are the tokens of {found} frames, found num_frames={num_frames}: remove it"
        )


def check_codes(tokens: torch.Tensor, codebook_size: int, name: str) -> None:
    """TokenizerError unless these are integer codes (B,t,h,w) of a codebook of this size."""
    integer = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not integer or tokens.ndim != 4 or 0 in tokens.shape[1:]:
        raise TokenizerError(
            f"{name} decodes integer codes of shape (B,t,h,w), found {tokens.dtype} of shape {tuple(tokens.shape)}:"
            f" pass them as encode returns them"
        )
    low, high = (int(bound) for bound in tokens.long().aminmax()) if tokens.numel() else (0, 0)
    if not 0 <= low <= high < codebook_size:
        raise TokenizerError(
            f"{name} decodes codes from 0 to {codebook_size - 1}, found {low} to {high}:"
            f" decode with the tokenizer that made them"
        )


class FakeTokenizer:
    """One token per 4x8x8 block, its mean brightness: quick, exact and easy to check by hand."""

    is_batched = False
    spec = TokenizerSpec(
        name="fake", kind="discrete", codebook_size=256, latent_dim=None,
        stride_thw=(4, 8, 8), weights_sha256=None, dtype="float32",
    )  # fmt: skip

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return grid_of(num_frames, height, width, self.spec)

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        return _brightness(frames_BTHWC, 8)

    def margins(self, frames_BTHWC: torch.Tensor) -> None:
        return None

    def decode(self, tokens: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        check_length(num_frames, 4 * tokens.shape[1], self.spec.name)
        tokens = _spread(tokens, 8)
        return tokens.to(torch.uint8).unsqueeze(-1).expand(*tokens.shape, 3).contiguous()


class FakeLevels:
    """Two levels of 16 codes each, the high and the low half of the mean brightness: of each 4x8x8 block both, or, with
    `native_grid`, the low half of each 4x4x4 block.
    """

    is_batched = False
    spec = TokenizerSpec(
        name="fake_levels", kind="discrete", codebook_size=16, latent_dim=None,
        stride_thw=(4, 8, 8), weights_sha256=None, dtype="float32",
    )  # fmt: skip

    def __init__(self, *, native_grid: bool = False) -> None:
        self._side = 4 if native_grid else 8

    def level_grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        t, h, w = grid_of(num_frames, height, width, self.spec)
        fine = 8 // self._side
        return (t, h, w), (t, fine * h, fine * w)

    def encode(self, frames_BTHWC: torch.Tensor) -> Levels:
        levels = _brightness(frames_BTHWC, 8) // 16, _brightness(frames_BTHWC, self._side) % 16
        return torch.stack(levels, dim=-1) if self._side == 8 else levels

    def margins(self, frames_BTHWC: torch.Tensor) -> Levels:
        codes = self.encode(frames_BTHWC)
        return torch.ones(codes.shape) if isinstance(codes, torch.Tensor) else [torch.ones(one.shape) for one in codes]

    def decode(self, tokens: Levels, num_frames: int | None = None) -> torch.Tensor:
        levels = tokens.unbind(-1) if isinstance(tokens, torch.Tensor) else tokens
        check_length(num_frames, 4 * levels[0].shape[1], self.spec.name)
        grey = 16 * _spread(levels[0], 8)
        grey += _spread(levels[1], 8 * levels[0].shape[2] // levels[1].shape[2]) if len(levels) > 1 else 8
        return grey.to(torch.uint8).unsqueeze(-1).expand(*grey.shape, 3).contiguous()


def _brightness(frames_BTHWC: torch.Tensor, side: int) -> torch.Tensor:
    """The mean of blocks of 4 frames and `side` rows and columns, int32."""
    b, t, h, w, _ = frames_BTHWC.shape
    blocks = frames_BTHWC.to(torch.int32).reshape(b, t // 4, 4, h // side, side, w // side, side, 3)
    return (blocks.sum(dim=(2, 4, 6, 7)) // (4 * side * side * 3)).to(torch.int32)


def _spread(values_Bthw: torch.Tensor, side: int) -> torch.Tensor:
    """Each value in all pixels of its block."""
    for dim, stride in ((1, 4), (2, side), (3, side)):
        values_Bthw = values_Bthw.repeat_interleave(stride, dim=dim)
    return values_Bthw
