"""How well ids of a pyramid are foretold: a small causal transformer over texts and levels (arXiv:2601.16210, 3.2).

The sequence is the text's words, a start, the first level, a separator, the second level, and so on; a level goes by
time, rows and columns. Every id is foretold bit by bit from what is before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .pyratok_text import EmbeddedText

Window = tuple[slice, slice, slice]
FREQUENCIES = 6  # of each axis: waves of 4, 8, .. sites of the latents' grid


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSites:
    """Signs (B,N,C) of one level in their order, and where (N,3) they are in time, rows and columns of the latents."""

    signs_BNC: torch.Tensor
    places_N3: torch.Tensor


def window_of(grid_thw: tuple[int, ...], most: int, generator: torch.Generator | None) -> Window:
    """Where a box of at most `most` sites is in a grid: the longest sides are halved, and it lies anywhere.

    `generator` is one of the CPU.
    """
    sides = list(grid_thw)
    while max(sides) > 1 and sides[0] * sides[1] * sides[2] > most:
        longest = sides.index(max(sides))
        sides[longest] = (sides[longest] + 1) // 2
    starts = [
        int(torch.randint(whole - side + 1, (), generator=generator))
        for whole, side in zip(grid_thw, sides, strict=True)
    ]
    t, h, w = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return t, h, w


def sites_of(signs_BCthw: torch.Tensor, ratio: tuple[int, int, int], window: Window) -> LevelSites:
    """The sites of one level that share those of `window`, a box of the latents' grid.

    `ratio` says how many frames, rows and columns of the level share a latent; the first frame has one alone.
    """
    every, rows, columns = ratio
    t, h, w = window
    first = [max(0, 1 + (at - 1) * every) for at in (t.start, t.stop)]
    spans = (
        torch.arange(*first),
        torch.arange(h.start * rows, h.stop * rows),
        torch.arange(w.start * columns, w.stop * columns),
    )
    inside = signs_BCthw[(slice(None), slice(None), *(slice(int(span[0]), int(span[-1]) + 1) for span in spans))]
    places = torch.meshgrid(*(span / each for span, each in zip(spans, ratio, strict=True)), indexing="ij")
    places_N3 = torch.stack(places, dim=-1).flatten(0, 2).to(signs_BCthw.device)
    return LevelSites(signs_BNC=inside.flatten(2).transpose(1, 2), places_N3=places_N3)


class CausalBlock(nn.Module):
    """Attention to what is before, and a layer of its own, each beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BSE: torch.Tensor, allowed_BSS: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm1(x_BSE)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, allowed_BSS[:, None])
        x_BSE = x_BSE + self.out(attended.transpose(1, 2).flatten(2))
        return x_BSE + self.mlp(self.norm2(x_BSE))


class BitPredictor(nn.Module):
    """Foretells the bits of every id. Signs are embedded by a product, so that gradients reach what made them."""

    def __init__(
        self, num_bits: int, num_levels: int, text_width: int | None, *, width: int = 64, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if width % heads or min(width, depth, heads) < 1:
            raise ValueError(f"sizes from 1 on, and heads that divide the width: {width=} {depth=} {heads=}")
        self.words = None if text_width is None else nn.Linear(text_width, width)
        self.bits = nn.Linear(num_bits, width)
        self.starts = nn.Parameter(torch.randn(num_levels, width))  # the start, and the separators
        self.levels = nn.Parameter(torch.randn(num_levels, width))
        self.here, self.ahead = (nn.Linear(6 * FREQUENCIES, width, bias=False) for _ in range(2))
        self.blocks = nn.ModuleList([CausalBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_bits)

    def forward(self, levels: Sequence[LevelSites], text: EmbeddedText | None) -> list[torch.Tensor]:
        """The logits (B,N,C) of each level's bits, from the text, the levels before, and the level's ids before."""
        num_clips = levels[0].signs_BNC.shape[0]
        parts = [self._embedded(sites, level) for level, sites in enumerate(levels)]
        num_words, is_known = 0, levels[0].signs_BNC.new_ones(num_clips, 0, dtype=torch.bool)
        if text is not None and self.words is not None:
            parts.insert(0, self.words(text.text_BLE))
            num_words, is_known = text.mask_BL.shape[1], text.mask_BL
        x_BSE = torch.cat(parts, dim=1)
        allowed_BSS = _allowed(is_known, x_BSE.shape[1])
        for block in self.blocks:
            x_BSE = block(x_BSE, allowed_BSS)
        lengths = [num_words, *(sites.signs_BNC.shape[1] + 1 for sites in levels)]
        of_levels = self.head(self.norm(x_BSE)).float().split(lengths, dim=1)[1:]
        return [logits_BNC[:, :-1] for logits_BNC in of_levels]  # the last id foretells nothing of its level

    def _embedded(self, sites: LevelSites, level: int) -> torch.Tensor:
        """A start and the ids behind it (B,1+N,E); each but the last knows where the next one is."""
        waves = _waves(sites.places_N3).to(self.head.weight.dtype)
        start_1E = self.starts[level, None]
        ids_BNE = self.bits(sites.signs_BNC.to(waves.dtype)) + self.here(waves) + self.levels[level]
        beginning = start_1E.expand(len(ids_BNE), 1, -1)
        return torch.cat((beginning, ids_BNE), dim=1) + F.pad(self.ahead(waves), (0, 0, 0, 1))


def _waves(places_N3: torch.Tensor) -> torch.Tensor:
    """Sines and cosines (N,6F) of places."""
    lengths_F = 2.0 ** torch.arange(2, 2 + FREQUENCIES, device=places_N3.device)
    angles = (2 * torch.pi * places_N3[..., None] / lengths_F).flatten(1)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _allowed(is_word_BL: torch.Tensor, length: int) -> torch.Tensor:
    """(B,S,S): which positions each one sees, itself and those before it that are no padding."""
    is_known_BS = F.pad(is_word_BL, (0, length - is_word_BL.shape[1]), value=True)
    before = torch.ones(length, length, dtype=torch.bool, device=is_word_BL.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=is_word_BL.device)
    return before & (is_known_BS[:, None] | itself)


def bit_loss(logits: Sequence[torch.Tensor], levels: Sequence[LevelSites]) -> torch.Tensor:
    """The mean cross-entropy, in nats, of the bits of all levels; nothing passes to the bits as what is foretold."""
    bits_BNC = torch.cat([sites.signs_BNC for sites in levels], dim=1) > 0
    return F.binary_cross_entropy_with_logits(torch.cat(list(logits), dim=1), bits_BNC.float())
