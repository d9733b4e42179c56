"""Whether a query is of whole videos or of parts of them, and what each policy gives with the tiers of a product."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal

import numpy as np

from ..schemas.errors import RecipeError
from .allocation import PAPER_GLOBAL, PAPER_OTHER, PAPER_RELEVANT, Policy, allocate

CONTRAST = 0.25  # of the best frames to all: above it, the query is of parts
CERTAINTY = 0.6  # from which a head is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The policy of a query, why, and how much the best tenth of the frames stands out in p."""

    policy: Literal["global", "fragment"]
    reason: str
    contrast: float


def choose_policy(
    p_N: np.ndarray, delta: float = CONTRAST, p_fragment: float | None = None, certainty: float = CERTAINTY
) -> Decision:
    """``fragment`` for a query of parts of videos, ``global`` for one of the whole, by p (N,) of all candidate frames.

    `p_fragment` is what a head says of the query: fragment from `certainty` on. Without it, fragment where the mean p
    of the best tenth of the frames is more than `delta` above the mean of all. Whatever is in doubt is global.
    ValueError for no frames, RecipeError for a probability that is none.
    """
    if not len(p_N):
        raise ValueError("a policy is chosen by one frame or more, found none")
    best = np.sort(p_N)[-max(1, -(-len(p_N) // 10)) :]
    contrast = float(best.mean() - np.mean(p_N))
    if p_fragment is None:
        stands_out = contrast > delta
        how = f"more than {delta:g}" if stands_out else f"not more than {delta:g}"
        reason = f"the best tenth of {len(p_N)} frames is {contrast:.2f} above the mean in p, {how}"
        return Decision(policy="fragment" if stands_out else "global", reason=reason, contrast=contrast)
    if not 0 <= p_fragment <= 1:
        raise RecipeError(f"p_fragment: found {p_fragment}; accepted: a probability from 0 to 1")
    is_certain = p_fragment >= certainty
    how = "certain" if is_certain else "not certain"
    reason = f"p_fragment is {p_fragment:.2f}, {how} enough ({certainty:g})"
    return Decision(policy="fragment" if is_certain else "global", reason=reason, contrast=contrast)


def tokens_given(
    p_N: np.ndarray, budget: int, policy: Policy, tiers: Sequence[int], floor: int = 0, *, fill: bool = False
) -> np.ndarray:
    """int64 tokens (N,), each none or one of `tiers`, `budget` at most in sum: `allocate` for tiers of any sizes.

    The rules with numbers of their own (``global``, ``paper_global``, ``paper_fragment``) have 256, 128 and 64 tokens
    of frames of 256: the highest tier, and those nearest to a half and to a quarter of it, stand for these. ``global``
    goes down to the lowest tier before it leaves frames out. RecipeError as `allocate`.
    """
    if policy not in ("global", "paper_global", "paper_fragment"):
        return allocate(p_N, budget, policy, tiers, floor, fill=fill)
    highest = max(tiers)
    half, quarter = (min(tiers, key=lambda tokens: abs(log2(tokens * part / highest))) for part in (2, 4))
    if policy == "paper_fragment":
        scaled = min(budget * PAPER_RELEVANT // highest, budget * PAPER_OTHER // quarter)
        given_N = allocate(p_N, scaled, policy, floor=floor)
        return np.select([given_N == PAPER_RELEVANT, given_N == PAPER_OTHER], [highest, quarter], 0)
    fitting = [tokens for tokens in tiers if tokens <= half and tokens * len(p_N) <= budget]
    tokens = half if policy == "paper_global" else max(fitting, default=min(tiers))
    is_given_N = allocate(p_N, budget // tokens * PAPER_GLOBAL, "paper_global", floor=floor) > 0
    return tokens * is_given_N.astype(np.int64)
