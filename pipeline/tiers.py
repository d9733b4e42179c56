"""Tiers of a grid: with how many tokens a step in time can be had, which bytes these are, and which frames it covers.

Codes that come in levels have a tier for every number of first levels. Other grids are thinned out in space: s = 2 has
every second row, s = 4 of these every second column, and s = 8 every fourth row and second column, from the first on.
In time nothing is left out, and what is left out in space is filled from the nearest token (`filled`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..schemas.errors import RecipeError
from .token_file import HIGH, LEVEL, LOW, TokenLayout, from_planes

THINNED = ((4, 2), (2, 2), (2, 1), (1, 1))  # s = 8, 4, 2, 1: every so many rows and columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One way to have a step of a grid: `num_tokens` of it. Tiers are numbered from 1, that of fewest tokens.

    Of codes in levels it is the first `levels` of them, of other tokens (`levels` 0) every so many rows and columns.
    """

    number: int
    num_tokens: int
    every_rows: int = 1
    every_columns: int = 1
    levels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes `begin` to `end` of a clip's `column`."""

    column: str
    begin: int
    end: int


def tiers_of(shape: Sequence[int], levels: Sequence[Sequence[int]] = ()) -> tuple[Tier, ...]:
    """The tiers of a step of a product's tokens (t,h,w), (t,h,w,d) or (t,h,w,L), by tokens, rising.

    Where levels have grids of their own (n,), they are the tiers of the whole clip. Grids too small for all of them
    have fewer.
    """
    if levels:
        is_one_grid = len(shape) == 4
        sizes = [int(np.prod(grid[1:] if is_one_grid else grid)) for grid in levels]
        sums = np.cumsum(sizes).tolist()
        return tuple(Tier(number=n, num_tokens=tokens, levels=n) for n, tokens in enumerate(sums, start=1))
    h, w = shape[1:3]
    kept: list[Tier] = []
    for rows, columns in THINNED:
        tier = Tier(
            number=len(kept) + 1, num_tokens=-(-h // rows) * -(-w // columns), every_rows=rows, every_columns=columns
        )
        is_more = not kept or tier.num_tokens > kept[-1].num_tokens
        if rows <= h and columns <= w and is_more:
            kept.append(tier)
    return tuple(kept)


def chosen_tiers(tiers: Sequence[Tier], wanted: Sequence[int] | None, product: str) -> list[Tier]:
    """The tiers of so many tokens, or all of them; RecipeError where there is none of such a number."""
    if wanted is None:
        return list(tiers)
    known = [tier.num_tokens for tier in tiers]
    if not wanted or set(wanted) - set(known):
        raise RecipeError(
            f"tiers: found {list(wanted)}; {product} has tiers of {', '.join(map(str, known))} tokens: choose of these"
        )
    return [tier for tier in tiers if tier.num_tokens in wanted]


def filled(tokens: torch.Tensor, tier: int, grid_hw: tuple[int, int]) -> torch.Tensor:
    """A step (h,w,...) of the whole grid from the tokens (h',w',...) that `tier` has of it, so that it can be decoded.

    What the tier leaves out is the nearest token that it has, of two the one before.
    """
    one = tiers_of((1, *grid_hw))[tier - 1]
    rows, columns = _nearest(grid_hw[0], one.every_rows), _nearest(grid_hw[1], one.every_columns)
    return tokens[rows][:, columns]


def _nearest(size: int, every: int) -> torch.Tensor:
    return ((torch.arange(size) + (every - 1) // 2) // every).clamp(max=-(-size // every) - 1)


@lru_cache(maxsize=4096)
def spans_of(layout: TokenLayout, step: int, tier: Tier) -> tuple[Span, ...]:
    """The bytes of a clip that a tier of one of its steps is read from, in the order of columns and bytes.

    Of thinned rows whole ones are read, and whole bytes where several codes have their high bits in one.
    """
    if layout.levels:
        rows = [(n, grid) for n, grid in enumerate(layout.levels[: tier.levels], start=1)]
        if len(layout.shape) == 1:
            return tuple(Span(column=f"{LEVEL}{n}", begin=0, end=2 * int(np.prod(grid))) for n, grid in rows)
        size = 2 * int(np.prod(layout.levels[0][1:]))
        return tuple(Span(column=f"{LEVEL}{n}", begin=step * size, end=(step + 1) * size) for n, _ in rows)
    _, h, w, *dims = layout.shape
    row = w * int(np.prod(dims))
    begins = (step * h + np.arange(0, h, tier.every_rows)) * row
    ends = begins + row
    bits = {LOW: 32 if layout.dtype == "float32" else 16} | ({HIGH: layout.high_bits} if layout.high_bits else {})
    each_column = (_joined(name, begins * each // 8, -(-ends * each // 8)) for name, each in bits.items())
    return tuple(span for spans in each_column for span in spans)


def _joined(column: str, begins: np.ndarray, ends: np.ndarray) -> list[Span]:
    """Spans of one column, those that touch or share bytes as one."""
    is_new = np.append(True, begins[1:] > ends[:-1])
    lasts = np.append(np.flatnonzero(is_new)[1:] - 1, len(begins) - 1)
    pairs = zip(begins[is_new].tolist(), ends[lasts].tolist(), strict=True)
    return [Span(column=column, begin=begin, end=end) for begin, end in pairs]


def tokens_of(parts: Sequence[bytes], layout: TokenLayout, step: int, tier: Tier) -> torch.Tensor:
    """The tokens that the bytes of `spans_of` hold: (h',w') or (h',w',d), of levels (h,w,m) or, on own grids, (n,).

    Codes are int32.
    """
    spans = spans_of(layout, step, tier)
    if layout.levels:
        codes = [torch.from_numpy(np.frombuffer(part, "<u2").astype(np.int32)) for part in parts]
        if len(layout.shape) == 1:
            return torch.cat(codes)
        return torch.stack(codes, dim=-1).reshape(*layout.levels[0][1:], tier.levels)
    num_values = int(np.prod(layout.shape[1:]))
    first = step * num_values
    skipped = first % (8 // layout.high_bits) if 0 < layout.high_bits < 8 else 0  # in the byte that it begins in
    held = replace(layout, shape=(skipped + num_values,))
    planes = {name: np.zeros((1, width), np.uint8) for name, width in held.widths.items()}
    starts = {LOW: (first - skipped) * held.widths[LOW] // held.num_values, HIGH: first * layout.high_bits // 8}
    for span, part in zip(spans, parts, strict=True):
        begin = span.begin - starts[span.column]
        planes[span.column][0, begin : begin + len(part)] = np.frombuffer(part, np.uint8)
    values = torch.from_numpy(from_planes(planes, held)[0, skipped:].reshape(layout.shape[1:]).copy())
    values = values.view(torch.bfloat16) if layout.dtype == "bfloat16" else values
    return values[:: tier.every_rows, :: tier.every_columns].contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFrames:
    """Which frames of a clip each step covers: those from `begins_t` on, before `ends_t`. Padding may follow."""

    begins_t: np.ndarray
    ends_t: np.ndarray


def frames_of_steps(num_frames: int, num_steps: int, tokenizer: Mapping[str, Any]) -> StepFrames:
    """The frames of clips of `num_frames` that each step of a grid covers, whose tokenizer's spec is `tokenizer`.

    Steps are groups of as many frames as its stride. Where frames are left over the first step has these: in causal
    grids of 1 + k strides the first frame alone. A grid of one step more than that is of a clip that was filled up at
    its end. Tokenizers that cut longer clips into windows do so in each of them.
    """
    stride = (tokenizer.get("stride_thw") or (-(-num_frames // num_steps),))[0]
    window = _window_frames(tokenizer)
    is_cut = window and num_steps == -(-num_frames // window) * -(-window // stride)
    length = window if window and is_cut else num_frames
    num_windows = -(-num_frames // length)
    per_window = num_steps // num_windows
    first = length - (per_window - 1) * stride if per_window == -(-length // stride) else 1
    ends = first + stride * np.arange(per_window)
    offsets = length * np.arange(num_windows)[:, None]
    return StepFrames(
        begins_t=(offsets + np.maximum(ends - stride, 0)).ravel(),
        ends_t=np.minimum((offsets + ends).ravel(), num_frames),
    )


def _window_frames(tokenizer: Mapping[str, Any]) -> int | None:
    """Frames of the windows that VidTok 1.0 cuts clips into; None for tokenizers that take clips as a whole."""
    name = tokenizer.get("name") or ""
    if not name.startswith("vidtok/") or name.endswith("_v1_1"):
        return None
    return 16 if "noncausal" in name else 17
