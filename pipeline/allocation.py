"""How many tokens of a budget each frame gets, by how much it matters (after VideoRouter, arXiv:2605.05848).

Frames are in the order of time and matter with p in [0,1]. Tiers are the numbers of tokens that a frame can have,
beside none at all. All plans are ordered lists of upgrades, applied until the first that does not fit: what a smaller
budget gives is then part of what a larger one gives.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..schemas.errors import RecipeError

Policy = Literal["global", "fragment", "utility", "paper_global", "paper_fragment"]
TIERS = (64, 128, 256)
RELEVANT = 0.5  # frames that matter so much are relevant
GLOBAL_CAP = 128  # tokens of a frame where all matter alike
PAPER_GLOBAL, PAPER_RELEVANT, PAPER_OTHER = 128, 256, 64  # tokens of a frame in the paper
SAFETY_TOKENS = 100  # that the paper leaves unused


def image_budget(most_tokens: int, text_tokens: int, generated_tokens: int) -> int:
    """What a context of `most_tokens` leaves for frames (section 3.3 of the paper), from 0."""
    return max(0, most_tokens - text_tokens - generated_tokens - SAFETY_TOKENS)


def allocate(
    p_N: np.ndarray,
    budget: int,
    policy: Policy,
    tiers: Sequence[int] = TIERS,
    floor: int = 0,
    *,
    fill: bool = False,
) -> np.ndarray:
    """int64 tokens (N,) of each frame, `budget` at most in sum.

    ``global`` gives all frames alike; ``fragment`` gives relevant ones (p >= 0.5) the highest tier and others the
    lowest, and with `fill` also others the highest, while there is budget; ``utility`` weighs all tiers by p log2(1 +
    c / lowest). With `floor` the best frame of each of so many parts of the clip comes first, at the lowest tier.
    ``paper_global`` and ``paper_fragment`` are the rules of the paper, with tiers of its own, and neither nested nor
    monotone. RecipeError for tiers, floors and budgets that cannot be.
    """
    _check(p_N, budget, tiers, floor)
    p_N = np.asarray(p_N, np.float64)
    if policy == "global":
        return _global(len(p_N), budget, min(tiers))
    if policy == "fragment":
        return _fragment(p_N, budget, (min(tiers), max(tiers)), floor, fill=fill)
    if policy == "utility":
        return _utility(p_N, budget, sorted(tiers), floor)
    if policy == "paper_global":
        return _spread(len(p_N), min(len(p_N), budget // PAPER_GLOBAL), PAPER_GLOBAL)
    if policy == "paper_fragment":
        return _paper_fragment(p_N, budget)
    raise RecipeError(f"policy: found {policy!r}; accepted: global, fragment, utility, paper_global, paper_fragment")


def _check(p_N: np.ndarray, budget: int, tiers: Sequence[int], floor: int) -> None:
    if np.ndim(p_N) != 1 or not ((np.asarray(p_N) >= 0) & (np.asarray(p_N) <= 1)).all():
        raise ValueError(f"one number from 0 to 1 for each frame is wanted: {p_N!r}")
    if not tiers or min(tiers) < 1 or len(set(tiers)) != len(tiers):
        raise RecipeError(f"tiers: found {list(tiers)}; accepted: different numbers of tokens from 1 on")
    if budget < 0:
        raise RecipeError(f"budget: found {budget}; accepted: tokens from 0 on")
    if floor < 0:
        raise RecipeError(f"floor: found {floor}; accepted: parts of a clip from 0 on")


def _spread(num_frames: int, count: int, tokens: int) -> np.ndarray:
    """`tokens` for `count` of the frames, at even distances, none for the others."""
    given_N = np.zeros(num_frames, np.int64)
    if count:
        given_N[(2 * np.arange(count) + 1) * num_frames // (2 * count)] = tokens
    return given_N


def _global(num_frames: int, budget: int, lowest: int) -> np.ndarray:
    tokens = max(GLOBAL_CAP, lowest)
    while num_frames * tokens > budget and tokens > lowest:
        tokens = max(lowest, tokens // 2)
    return _spread(num_frames, min(num_frames, budget // tokens), tokens)


def _fragment(p_N: np.ndarray, budget: int, tiers: tuple[int, int], floor: int, *, fill: bool) -> np.ndarray:
    lowest, highest = tiers
    first = _floor_frames(p_N, floor)
    best = _by_relevance(p_N)
    relevant, others = best[p_N[best] >= RELEVANT], best[p_N[best] < RELEVANT]
    steps = [
        (first, lowest),
        (relevant[~np.isin(relevant, first)], lowest),
        (relevant, highest - lowest),
        (others[~np.isin(others, first)], lowest),
        (others if fill else others[:0], highest - lowest),
    ]
    frames = np.concatenate([frames for frames, _ in steps])
    costs = np.concatenate([np.full(len(frames), cost) for frames, cost in steps])
    return _applied(frames, costs, budget, len(p_N))


def _utility(p_N: np.ndarray, budget: int, tiers: Sequence[int], floor: int) -> np.ndarray:
    first = _floor_frames(p_N, floor)
    use = np.log2(1 + np.array([0, *tiers]) / tiers[0])
    costs_K = np.diff([0, *tiers])
    frames, levels = (axis.ravel() for axis in np.meshgrid(np.arange(len(p_N)), np.arange(len(tiers)), indexing="ij"))
    is_left = ~((levels == 0) & np.isin(frames, first))
    frames, levels = frames[is_left], levels[is_left]
    gains = p_N[frames] * (np.diff(use) / costs_K)[levels]
    order = np.lexsort((frames, -p_N[frames], levels, -gains))
    frames, costs = frames[order], costs_K[levels[order]]
    frames, costs = np.concatenate((first, frames)), np.concatenate((np.full(len(first), tiers[0]), costs))
    return _applied(frames, costs, budget, len(p_N))


def _paper_fragment(p_N: np.ndarray, budget: int) -> np.ndarray:
    """All relevant frames at 256 and as many others as fit at 64; where the relevant ones do not fit, some of them."""
    relevant = np.flatnonzero(p_N > RELEVANT)
    given_N = np.zeros(len(p_N), np.int64)
    if PAPER_RELEVANT * len(relevant) > budget:
        given_N[relevant] = _spread(len(relevant), budget // PAPER_RELEVANT, PAPER_RELEVANT)
        return given_N
    given_N[relevant] = PAPER_RELEVANT
    best = _by_relevance(p_N)
    others = best[~np.isin(best, relevant)]
    given_N[others[: (budget - PAPER_RELEVANT * len(relevant)) // PAPER_OTHER]] = PAPER_OTHER
    return given_N


def _by_relevance(p_N: np.ndarray) -> np.ndarray:
    """Frames from the one that matters most, of equal ones the first."""
    return np.argsort(-p_N, kind="stable")


def _floor_frames(p_N: np.ndarray, floor: int) -> np.ndarray:
    """The best frame of each part of the clip, parts by their reversed bits: what is cut of them is still spread."""
    bits = max(0, floor - 1).bit_length()
    reversed_bits = [int(f"{g:0{bits}b}"[::-1], 2) if bits else 0 for g in range(1 << bits)]
    chosen: list[int] = []
    for g in (g for g in reversed_bits if g < floor):
        begin, end = g * len(p_N) // floor, (g + 1) * len(p_N) // floor
        if begin < end:
            chosen.append(begin + int(p_N[begin:end].argmax()))
    return np.array(chosen, np.int64)


def _applied(frames: np.ndarray, costs: np.ndarray, budget: int, num_frames: int) -> np.ndarray:
    """What each frame has after the upgrades before the first that does not fit."""
    count = int(np.searchsorted(costs.cumsum(), budget, side="right"))
    given_N = np.zeros(num_frames, np.int64)
    np.add.at(given_N, frames[:count], costs[:count])
    return given_N
