"""The grids of PyraTok's pyramid, what goes between them, and what one level takes from features and from text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .pyratok_layers import LengthNorm
from .pyratok_text import EmbeddedText
from .pyratok_vae import VaeSizes

Ratio = tuple[int, int, int]  # how many sites of one grid share one of another, over time, rows and columns
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strides:
    """How many frames, rows and columns share a site of each level's features, an id of each level, and a latent."""

    taps: tuple[Ratio, ...]
    levels: tuple[Ratio, ...]
    latents: Ratio

    @staticmethod
    def of(sizes: VaeSizes, *, native_grid: bool) -> "Strides":
        """Of features behind each layer that halves grids, and behind the middle; ids are there or with the latents."""
        depths = [*range(1, len(sizes.dim_mult)), len(sizes.dim_mult) - 1]
        taps = tuple((2 ** sum(sizes.temperal_downsample[:depth]), 2**depth, 2**depth) for depth in depths)
        latents = sizes.stride_thw
        return Strides(taps=taps, levels=taps if native_grid else (latents,) * len(taps), latents=latents)

    def last(self, count: int) -> "Strides":
        """Those of the deepest levels alone."""
        return Strides(taps=self.taps[-count:], levels=self.levels[-count:], latents=self.latents)

    @property
    def tap_ratios(self) -> list[Ratio]:
        """How many sites of each level's features share one of its ids."""
        return _ratios(self.taps, self.levels)

    @property
    def step_ratios(self) -> list[Ratio]:
        """How many ids of each level but the last share one of the next level."""
        return _ratios(self.levels[:-1], self.levels[1:])

    @property
    def latent_ratios(self) -> list[Ratio]:
        """How many ids of each level share a latent."""
        return _ratios(self.levels, (self.latents,) * len(self.levels))

    def grids_of(self, latents_thw: Grid) -> tuple[Grid, ...]:
        """The grid of the ids of each level, of that of the latents."""
        t, h, w = latents_thw
        return tuple((1 + (t - 1) * every, h * rows, w * columns) for every, rows, columns in self.latent_ratios)


def _ratios(fine: Sequence[Ratio], coarse: Sequence[Ratio]) -> list[Ratio]:
    pairs = zip(fine, coarse, strict=True)
    return [(c // f, c_rows // f_rows, c_cols // f_cols) for (f, f_rows, f_cols), (c, c_rows, c_cols) in pairs]


def pooled(
    x_BCthw: torch.Tensor,
    ratio: Ratio,
    how: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] = torch.mean,
) -> torch.Tensor:
    """Means over `ratio` frames, rows and columns. A clip's first frame stays alone in time.

    A piece of a clip without its first frame has a multiple of the ratio's frames, one with it has one more; ValueError
    for others.
    """
    every, rows, columns = ratio
    b, c, t, h, w = x_BCthw.shape
    if t % every not in (0, 1) or h % rows or w % columns:
        raise ValueError(f"{t} frames of {h}x{w} sites are not pooled by {ratio}")
    if rows > 1 or columns > 1:
        x_BCthw = how(x_BCthw.reshape(b, c, t, h // rows, rows, w // columns, columns), (4, 6))
    if every == 1:
        return x_BCthw
    first, rest = x_BCthw.split((t % every, t - t % every), dim=2)
    return torch.cat((first, how(rest.unflatten(2, (t // every, every)), (3,))), dim=2)


def spread(z_BCthw: torch.Tensor, ratio: Ratio) -> torch.Tensor:
    """What `pooled` gives, of a clip, at every site that it was made of."""
    every, rows, columns = ratio
    wide = z_BCthw.repeat_interleave(rows, 3).repeat_interleave(columns, 4)
    return torch.cat((wide[:, :, :1], wide[:, :, 1:].repeat_interleave(every, 2)), dim=2)


class TextAttention(nn.Module):
    """What sites attend to in their clip's text."""

    def __init__(self, num_bits: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.context_norm = nn.LayerNorm(num_bits), nn.LayerNorm(num_bits)
        self.context = nn.Linear(text_width, num_bits)
        self.query, self.out = nn.Linear(num_bits, num_bits), nn.Linear(num_bits, num_bits)
        self.key_value = nn.Linear(num_bits, 2 * num_bits)

    def forward(self, y_BCthw: torch.Tensor, text: EmbeddedText) -> torch.Tensor:
        """float32 (B,C,t,h,w), 0 for clips without text."""
        dtype = self.out.weight.dtype
        sites_BNC = y_BCthw.flatten(2).transpose(1, 2).to(dtype).contiguous()  # as in `PyramidLevel.inputs`
        query = self._by_head(self.query(self.query_norm(sites_BNC)))
        context_BLC = self.context_norm(self.context(text.text_BLE.to(dtype)))
        key, value = (self._by_head(half) for half in self.key_value(context_BLC).chunk(2, dim=-1))
        given_B11 = text.given_B[:, None, None]
        used_B11L = (text.mask_BL[:, None] | ~given_B11)[:, None]  # without a text all are attended to, for nothing
        attended = F.scaled_dot_product_attention(query, key, value, used_B11L)
        attended_BNC = self.out(attended.transpose(1, 2).flatten(2)).float() * given_B11
        return attended_BNC.transpose(1, 2).reshape(y_BCthw.shape)

    def _by_head(self, x_BNC: torch.Tensor) -> torch.Tensor:
        return x_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PyramidLevel(nn.Module):
    """What one level takes from features of `channels`, and from texts where it has a width for them."""

    def __init__(self, channels: int, num_bits: int, text_width: int | None, heads: int) -> None:
        super().__init__()
        self.norm = LengthNorm(channels)
        self.proj = nn.Linear(channels, num_bits)
        nn.init.normal_(self.proj.weight, std=channels**-0.5)  # what comes out is of about unit size
        nn.init.zeros_(self.proj.bias)
        if text_width is not None:
            self.text = TextAttention(num_bits, text_width, heads)

    def inputs(self, features_BCthw: torch.Tensor, ratio: Ratio) -> torch.Tensor:
        """What `proj` takes (B,t,h,w,C'): features on the level's grid, pooled in float32."""
        # Contiguous, as products of others round in a way that hangs on whether weights are being trained.
        pooled_BthwC = pooled(features_BCthw.float(), ratio).movedim(1, -1).contiguous()
        return self.norm(pooled_BthwC.to(self.proj.weight.dtype))

    def forward(self, features_BCthw: torch.Tensor, ratio: Ratio) -> torch.Tensor:
        """What features say of the normalized latents, float32 (B,C,t,h,w) on the level's grid."""
        return self.proj(self.inputs(features_BCthw, ratio)).float().movedim(-1, 1)
