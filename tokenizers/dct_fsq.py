"""A tokenizer without weights: a 3-D DCT of each block, finite scalar quantisation of its lowest coefficients.

Colour is YCoCg. Each coefficient has its own number of levels, and their product is the codebook size (finite
scalar quantisation: Mentzer et al. 2023, arXiv:2309.15505, here without the learned part). All arithmetic is on
integers, or on multiples of 2^-13, that float32 holds exactly: codes and decoded frames are the same on every
machine, for every batch size and every number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from ..schemas.errors import TokenizerError, did_you_mean
from ..schemas.tokens import TokenizerSpec
from .base import check_codes, check_frames, check_length, grid_of

# The coefficients kept of a block, highest digit of the code first: the weights of (R,G,B), and the axis (0 time,
# 1 rows, 2 columns) of the lowest cosine, or None for the mean. Y = R+2G+B, Co = R-B, Cg = -R+2G-B.
COEFFICIENTS: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "y": ((1, 2, 1), None),
    "y_time": ((1, 2, 1), 0),
    "y_row": ((1, 2, 1), 1),
    "y_column": ((1, 2, 1), 2),
    "co": ((1, 0, -1), None),
    "cg": ((-1, 2, -1), None),
}

# 32 cos(pi (2i+1) / 2n), rounded, over the first half of n positions; the second half is its negative mirror.
COSINE_ONE = 32
HALF_COSINES = {4: (30, 12), 8: (31, 27, 18, 6), 16: (32, 31, 28, 25, 20, 15, 9, 3)}

# What a decoded luma pixel takes from its mirror image across the border of its block: at the border, one further
# in, ..., along time, rows and columns. Chroma, kept as means alone, is drawn in straight lines between them.
LUMA_FADES = ((0.25,), (0.25, 0.125), (0.25, 0.125))

EXACT_LIMIT = 2**24  # float32 holds every integer up to here


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A block of `stride_thw` frames, rows and columns, and the levels of each of its coefficients.

    Levels are the grey levels that they decode to, ascending; neighbours meet half-way between them.
    """

    stride_thw: tuple[int, int, int]
    levels: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if list(self.levels) != list(COEFFICIENTS):
            raise ValueError(f"levels are wanted for {list(COEFFICIENTS)} in this order: {list(self.levels)=}")

    @property
    def codebook_size(self) -> int:
        """How many codes there are: the product of the numbers of levels."""
        return prod(len(values) for values in self.levels.values())


def _both_signs(*values: int) -> tuple[int, ...]:
    return tuple(-v for v in reversed(values)) + values


# Near the optimum on real clips (docs/benchmarks.md), with chroma drawn wide so that vivid colours keep their hue.
_FINE = {
    "y": tuple(range(4, 256, 8)),
    "y_time": _both_signs(1, 36),
    "y_row": _both_signs(2, 10, 24, 46),
    "y_column": _both_signs(2, 10, 26, 52),
    "co": (-72, -30, -10, 1, 9, 19, 40, 72),
    "cg": (-36, 0, 14, 38),
}
_COARSE = _FINE | {
    "y_row": _both_signs(3, 25),
    "y_column": _both_signs(4, 29),
    "co": (-30, 0, 13, 50),
    "cg": (-30, 0, 14, 38),
}
VARIANTS = {
    "488_262144": Variant(stride_thw=(4, 8, 8), levels=_FINE),
    "488_32768": Variant(stride_thw=(4, 8, 8), levels=_COARSE),
    "41616_262144": Variant(stride_thw=(4, 16, 16), levels=_FINE),
    "888_32768": Variant(stride_thw=(8, 8, 8), levels=_COARSE),
}


class DctFsq:
    """The tokenizer of one variant; holds its integer analysis matrix and its tables on a device."""

    is_batched = False  # and exact

    def __init__(self, variant: str, *, device: str = "cpu") -> None:
        if variant not in VARIANTS:
            near = did_you_mean(variant, list(VARIANTS))
            raise TokenizerError(f"dct_fsq has no variant {variant!r}{near}: accepted are {', '.join(VARIANTS)}")
        table = VARIANTS[variant]
        self._codebook_size = table.codebook_size
        self.spec = TokenizerSpec(
            name=f"dct_fsq/{variant}", kind="discrete", codebook_size=table.codebook_size, latent_dim=None,
            stride_thw=table.stride_thw, weights_sha256=None, dtype="float32",
        )  # fmt: skip
        self._device = torch.device(device)
        weights_NK, gains = _analysis(table.stride_thw)
        self._weights_NK = weights_NK.float().to(self._device)
        levels = table.levels.values()
        self._bounds = [_bounds(values, gain).to(self._device) for values, gain in zip(levels, gains, strict=True)]
        self._levels = [torch.tensor(values, dtype=torch.float32, device=self._device) for values in levels]
        self._kernels = [_AxisKernels.of(axis, n, self._device) for axis, n in enumerate(table.stride_thw)]

    def grid_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The (t,h,w) grid of a clip of this size; TokenizerError unless the strides divide it."""
        return grid_of(num_frames, height, width, self.spec)

    def encode(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """int32 codes (B,t,h,w) of uint8 RGB frames (B,T,H,W,3), on the tokenizer's device.

        TokenizerError for another shape or dtype, and for sizes that the strides do not divide.
        """
        check_frames(frames_BTHWC, self.spec.name)
        grid = self.grid_shape(*frames_BTHWC.shape[1:4])
        codes_Bthw = torch.empty((len(frames_BTHWC), *grid), dtype=torch.int32, device=self._device)
        # Clip by clip, because the float32 copy of one clip stays in the processor's cache.
        for codes_thw, frames_THWC in zip(codes_Bthw, frames_BTHWC, strict=True):
            codes_thw.copy_(self._encode_clip(frames_THWC.to(self._device)))
        return codes_Bthw

    def margins(self, frames_BTHWC: torch.Tensor) -> None:
        """Codes are exact."""

    def decode(self, tokens: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """uint8 RGB frames (B,T,H,W,3) of integer codes (B,t,h,w), on the tokenizer's device.

        TokenizerError for another shape or dtype, and for codes outside [0, codebook_size).
        """
        check_codes(tokens, self._codebook_size, self.spec.name)
        check_length(num_frames, tokens.shape[1] * self.spec.stride_thw[0], self.spec.name)
        codes_Bthw = tokens.to(self._device, torch.int64)
        sizes = [g * stride for g, stride in zip(codes_Bthw.shape[1:], self.spec.stride_thw, strict=True)]
        frames_BTHWC = torch.empty((len(codes_Bthw), *sizes, 3), dtype=torch.uint8, device=self._device)
        for frames_THWC, codes_thw in zip(frames_BTHWC, codes_Bthw, strict=True):
            frames_THWC.copy_(self._decode_clip(codes_thw))
        return frames_BTHWC

    def _encode_clip(self, frames_THWC: torch.Tensor) -> torch.Tensor:
        f, s, _ = self.spec.stride_thw
        t, h, w = self.grid_shape(*frames_THWC.shape[:3])
        blocks_MN = frames_THWC.reshape(t, f, h, s, w, s, 3).permute(0, 2, 4, 1, 3, 5, 6).reshape(t * h * w, -1)
        sums_KM = (blocks_MN.float() @ self._weights_NK).T.contiguous()
        codes_M = torch.zeros(t * h * w, dtype=torch.int32, device=self._device)
        for sums_M, bounds in zip(sums_KM, self._bounds, strict=True):
            codes_M = codes_M * (len(bounds) + 1) + torch.bucketize(sums_M, bounds, out_int32=True, right=True)
        return codes_M.reshape(t, h, w)

    def _decode_clip(self, codes_thw: torch.Tensor) -> torch.Tensor:
        fields: list[torch.Tensor] = []
        for levels in reversed(self._levels):
            fields.append(levels[codes_thw % len(levels)])
            codes_thw = codes_thw // len(levels)
        cg, co, *slopes, luma = fields
        for axis, kernels in enumerate(self._kernels):
            slope = slopes.pop()
            luma = _stretched(luma, axis, kernels.flat) + _stretched(slope, axis, kernels.cosine)
            slopes = [_stretched(other, axis, kernels.flat) for other in slopes]
            co, cg = _stretched(co, axis, kernels.line), _stretched(cg, axis, kernels.line)
        frames_THWC = torch.stack((luma + co - cg, luma + cg, luma - co - cg), dim=-1)
        return frames_THWC.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _cosine(length: int) -> list[int]:
    half = HALF_COSINES[length]
    return [*half, *(-v for v in reversed(half))]


def _analysis(stride_thw: tuple[int, int, int]) -> tuple[torch.Tensor, list[int]]:
    """Integer weights (N,K) of a block's N = f*s*s*3 values, and what one grey level of each coefficient sums to."""
    columns, gains = [], []
    for rgb, axis in COEFFICIENTS.values():
        pattern_fss = torch.ones(stride_thw, dtype=torch.int64)
        if axis is not None:
            shape = [-1 if dim == axis else 1 for dim in range(3)]
            pattern_fss = pattern_fss * torch.tensor(_cosine(stride_thw[axis])).reshape(shape)
        columns.append((pattern_fss.unsqueeze(-1) * torch.tensor(rgb)).flatten())
        one = 1 if axis is None else COSINE_ONE
        gains.append(int((pattern_fss**2).sum()) * sum(map(abs, rgb)) // one)
    weights_NK = torch.stack(columns, dim=1)
    # Any order of summation stays between the sum of the negative terms and that of the positive ones.
    reach = 255 * max(int(weights_NK.clamp(min=0).sum(0).max()), -int(weights_NK.clamp(max=0).sum(0).min()))
    if reach > EXACT_LIMIT:
        raise ValueError(f"float32 sums are exact up to {EXACT_LIMIT}, blocks of {stride_thw} reach {reach}")
    return weights_NK, gains


def _bounds(values: tuple[int, ...], gain: int) -> torch.Tensor:
    """The sums (L-1,) at which the levels 1 to L-1 begin: midpoints of `values`, as float32 integers."""
    return torch.tensor([(low + high) * gain // 2 for low, high in pairwise(values)], dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """How a block's pixels along one axis (n,) follow from its own number and those of its two neighbours.

    Beyond the edge of a clip lies the clip's mirror image: the first number, times `mirror`.
    """

    own: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    mirror: int

    @staticmethod
    def of(shape: list[float], fade: Sequence[float], mirror: int, device: torch.device) -> "_Kernel":
        """The kernel of the basis `shape` (n,), whose mirror image is `mirror` times itself."""
        before = torch.tensor([*fade, *[0.0] * (len(shape) - len(fade))])
        after, values = before.flip(0), torch.tensor(shape)
        parts = values * (1 - before - after), values * before * mirror, values * after * mirror
        own, before, after = (part.to(device) for part in parts)
        return _Kernel(own=own, before=before, after=after, mirror=mirror)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AxisKernels:
    """The three kernels of one axis: luma without and with a cosine along it, and chroma."""

    flat: _Kernel
    cosine: _Kernel
    line: _Kernel

    @staticmethod
    def of(axis: int, length: int, device: torch.device) -> "_AxisKernels":
        ones, fade = [1.0] * length, LUMA_FADES[axis]
        line = [(length - 1 - 2 * i) / (2 * length) for i in range(length // 2)]
        return _AxisKernels(
            flat=_Kernel.of(ones, fade, 1, device),
            cosine=_Kernel.of([v / COSINE_ONE for v in _cosine(length)], fade, -1, device),
            line=_Kernel.of(ones, line, 1, device),
        )


def _stretched(field: torch.Tensor, dim: int, kernel: _Kernel) -> torch.Tensor:
    """`field` with every number along `dim` drawn out to the pixels of its block."""
    count = field.shape[dim]
    before = torch.cat((field.narrow(dim, 0, 1) * kernel.mirror, field.narrow(dim, 0, count - 1)), dim)
    after = torch.cat((field.narrow(dim, 1, count - 1), field.narrow(dim, count - 1, 1) * kernel.mirror), dim)
    terms = ((field, kernel.own), (before, kernel.before), (after, kernel.after))
    shape = [-1, *[1] * (field.ndim - 1 - dim)]
    own, one, other = (part.unsqueeze(dim + 1) * weight.reshape(shape) for part, weight in terms)
    return (own + one + other).flatten(dim, dim + 1)
