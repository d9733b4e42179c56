"""Comparing what is stored of a product with what the same source gives again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..pipeline.mask_metrics import overlaps_of
from ..schemas.tokens import TrajectoryTokens

SMALL_MARGIN = 1e-4  # a code that was so near to another one may become it when sums are taken in another order
# Of the largest stored value. The machine that made them makes the same bits again; others sum in another order, about
# 3e-6 in float32, and what is stored in 16 bits may then round to its neighbour.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}

# Of patches, slots or pixels that are nearly as much one thing as another: they may become it on another machine.
OTHER_SHARE = 0.01


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Stored against remade tokens of one product, over all clips so far."""

    product: str
    dtype: str | None  # of latents; codes have none and are compared exactly
    num_clips: int = 0
    num_values: int = 0
    num_other_values: int = 0
    num_near_values: int = 0  # of these, codes whose latents lie next to a rounding boundary
    largest_error: float = 0.0
    sum_errors: float = 0.0
    largest_value: float = 0.0
    other_clip_ids: list[str] = field(default_factory=list)

    def add(
        self,
        clip_ids: Sequence[str],
        stored_N: torch.Tensor,
        made_N: torch.Tensor,
        margins: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> None:
        """Count the differences of a batch of clips, tokens (N,t,h,w) or (N,t,h,w,d); `margins` are those of codes."""
        errors_Nv = (stored_N.double() - made_N.double()).abs().flatten(1)
        differs_Nv = ~(errors_Nv == 0)  # what is not a number differs too
        others_N = differs_Nv.any(dim=1).tolist()
        self.num_clips += len(clip_ids)
        self.num_values += errors_Nv.numel()
        self.num_other_values += int(differs_Nv.sum())
        if self.dtype is None and any(others_N) and (margins_N := margins()) is not None:
            self.num_near_values += int(((margins_N.cpu().flatten(1) < SMALL_MARGIN) & differs_Nv).sum())
        self.other_clip_ids += [clip_id for clip_id, is_other in zip(clip_ids, others_N, strict=True) if is_other]
        self.largest_error = max(self.largest_error, errors_Nv.max().item())
        self.sum_errors += errors_Nv.sum().item()
        self.largest_value = max(self.largest_value, stored_N.double().abs().max().item())

    @property
    def is_close(self) -> bool:
        """Whether codes are the same where they are certain, and latents within the tolerance."""
        if self.dtype is None:
            return self.num_other_values == self.num_near_values
        return not math.isnan(self.sum_errors) and self.largest_error <= TOLERANCES[self.dtype] * self.largest_value

    def figures(self) -> str:
        """What was found, in one line."""
        if self.dtype is None:
            clips = f"in {len(self.other_clip_ids)} of {self.num_clips:,} clips"
            near = f" ({self.num_near_values:,} next to a rounding boundary)" if self.num_near_values else ""
            return f"{self.product}: {self.num_other_values:,} of {self.num_values:,} codes differ{near}, {clips}"
        mean = self.sum_errors / max(1, self.num_values)
        return (
            f"{self.product}: largest error {self.largest_error:.3g}, mean {mean:.3g}, in {self.num_clips:,} clips of"
            f" values up to {self.largest_value:.3g}; tolerance {TOLERANCES[self.dtype]:g} of that"
        )


@dataclass(slots=True, kw_only=True)
class TrajectoryComparison:
    """Stored against remade tokens of trajectories: those of the same slots by value, and which slots there are."""

    values: Comparison
    patches: "TrackComparison"
    num_rows: int = 0
    num_other_rows: int = 0

    def add(self, clip_id: str, stored: TrajectoryTokens, made: TrajectoryTokens) -> None:
        """Count the differences of one clip."""
        rows = [list(zip(one.chunks_N.tolist(), one.slots_N.tolist(), strict=True)) for one in (stored, made)]
        seen: list[dict[tuple[int, int], int]] = [{} for _ in rows]
        numbered = [[(*key, _count(counts, key)) for key in keys] for keys, counts in zip(rows, seen, strict=True)]
        self.patches.add(clip_id, stored.tracks_Thw, made.tracks_Thw)
        common = sorted(set(numbered[0]) & set(numbered[1]))
        self.num_rows += len(numbered[0])
        self.num_other_rows += len(numbered[0]) + len(numbered[1]) - 2 * len(common)
        chosen = [[keys.index(key) for key in common] for keys in numbered]
        if common:
            before, now = (self._values(one)[index][None] for one, index in zip((stored, made), chosen, strict=True))
            self.values.add([clip_id], before, now)

    def _values(self, tokens: TrajectoryTokens) -> torch.Tensor:
        values = torch.from_numpy(tokens.values_Nd)
        return values.view(torch.bfloat16) if self.values.dtype == "bfloat16" else values

    @property
    def num_clips(self) -> int:
        """How many clips have been compared."""
        return self.patches.num_clips

    @property
    def other_clip_ids(self) -> list[str]:
        """Clips with other values or assignments."""
        return sorted({*self.values.other_clip_ids, *self.patches.other_clip_ids})

    @property
    def is_close(self) -> bool:
        """Whether nearly all slots and patches are the same, and tokens within the tolerance."""
        few_others = self.num_other_rows <= OTHER_SHARE * self.num_rows
        return few_others and self.patches.is_close and self.values.is_close

    def figures(self) -> str:
        """What was found, in one line."""
        patches = f"{self.patches.num_other:,} of {self.patches.num:,} patches differ"
        others = f"{self.num_other_rows:,} of {self.num_rows:,} tokens are of other slots"
        return f"{self.values.figures()}; {others}, {patches}"


@dataclass(slots=True, kw_only=True)
class TrackComparison:
    """Stored against remade tracks, by pixels or patches. Which number a trajectory has does not matter."""

    product: str
    num_clips: int = 0
    num: int = 0
    num_other: int = 0
    other_clip_ids: list[str] = field(default_factory=list)

    def add(self, clip_id: str, stored_THW: np.ndarray, made_THW: np.ndarray) -> None:
        """Count the pixels of one clip that are of no pair of trajectories, matched so that most are."""
        shared = overlaps_of(made_THW + 1, stored_THW + 1).shared_pj
        num_other = stored_THW.size - int(shared[linear_sum_assignment(shared, maximize=True)].sum())
        self.num_clips += 1
        self.num += stored_THW.size
        self.num_other += num_other
        self.other_clip_ids += [clip_id] if num_other else []

    @property
    def is_close(self) -> bool:
        """Whether nearly all of them are of the same trajectory."""
        return self.num_other <= OTHER_SHARE * self.num

    def figures(self) -> str:
        """What was found, in one line."""
        clips = f"in {len(self.other_clip_ids)} of {self.num_clips:,} clips"
        return f"{self.product}: {self.num_other:,} of {self.num:,} pixels differ, {clips}"


def _count(counts: dict[tuple[int, int], int], key: tuple[int, int]) -> int:
    """How often a slot has come before in its chunk: its sub-tokens follow one another."""
    counts[key] = counts.get(key, -1) + 1
    return counts[key]
