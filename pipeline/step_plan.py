"""The step plan: which positions of an epoch make the batch of each step, whatever the number of ranks and workers.

A global batch is a function of the order, the epoch and the step alone. Rank r of w takes the clips, or packs, r,
r + w, r + 2 w, ... of it.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Tail = Literal["keep", "drop", "wrap"]
PACKED_TOGETHER = 4096  # positions whose clips may share a pack


@dataclass(frozen=True, slots=True)
class StepPositions:
    """The positions of one rank in some steps: those of step i are ``positions_N[ends_S[i - 1]:ends_S[i]]``."""

    positions_N: np.ndarray
    ends_S: np.ndarray


class StepPlan(Protocol):
    """Positions by step."""

    def num_steps(self, epoch: int) -> int:
        """Steps in an epoch, the same for every rank."""
        ...

    def positions(self, epoch: int, steps_S: np.ndarray, rank: int, world_size: int) -> StepPositions | None:
        """The positions of rank `rank` in rising steps; fewer steps where the epoch ends, None where none is left."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CountPlan:
    """Batches of `batch_size` clips over `num_positions`, the tail kept as a smaller batch, dropped or filled up.

    A tail that is filled up wraps around to the epoch's first positions.
    """

    num_positions: int
    batch_size: int
    tail: Tail

    def num_steps(self, epoch: int) -> int:
        """As StepPlan."""
        whole, left = divmod(self.num_positions, self.batch_size)
        return whole + (left > 0 and self.tail != "drop")

    def positions(self, epoch: int, steps_S: np.ndarray, rank: int, world_size: int) -> StepPositions | None:
        """As StepPlan."""
        steps_S = steps_S[steps_S < self.num_steps(epoch)]
        if not steps_S.size:
            return None
        mine = np.arange(rank, self.batch_size, world_size)
        positions_SB = steps_S[:, None] * self.batch_size + mine
        ends_S = np.arange(1, len(steps_S) + 1) * len(mine)
        positions_N = positions_SB.reshape(-1)
        if positions_N[-1:] < self.num_positions:
            return StepPositions(positions_N, ends_S)
        if self.tail == "wrap":
            return StepPositions(positions_N % self.num_positions, ends_S)
        inside_SB = positions_SB < self.num_positions
        return StepPositions(positions_N[inside_SB.reshape(-1)], np.cumsum(inside_SB.sum(axis=1)))


@dataclass(slots=True)
class BudgetPlan:
    """Batches of `num_packs` packs, each of clips with at most `budget` tokens together; no clip is cut or left out.

    `tokens_of` gives the tokens of the clips at positions of an epoch. Clips are packed within every PACKED_TOGETHER
    positions; packs follow each other by their first position. `fill` is what was packed so far.
    """

    num_positions: int
    num_packs: int
    budget: int
    tail: Tail
    tokens_of: Callable[[int, np.ndarray], np.ndarray]
    fill: "Fill" = field(default_factory=lambda: Fill())
    _known: dict[int, tuple[int, int]] = field(default_factory=dict)  # by epoch: a window, and the packs before it
    _counted: dict[int, int] = field(default_factory=dict)

    def num_steps(self, epoch: int) -> int:
        """As StepPlan; packs a whole epoch to know."""
        if epoch not in self._counted:
            self._counted[epoch] = sum(len(packs) for _, packs in self._windows(epoch, 0))
        whole, left = divmod(self._counted[epoch], self.num_packs)
        return whole + (left > 0 and self.tail != "drop")

    def positions(self, epoch: int, steps_S: np.ndarray, rank: int, world_size: int) -> StepPositions | None:
        """As StepPlan."""
        if not steps_S.size:
            return None
        first, last = int(steps_S[0]) * self.num_packs, (int(steps_S[-1]) + 1) * self.num_packs
        packs = self._packs(epoch, first, last)
        mine: list[np.ndarray] = []
        ends: list[int] = []
        for step in (steps_S * self.num_packs - first).tolist():
            of_step = packs[step : step + self.num_packs]
            if not of_step or (len(of_step) < self.num_packs and self.tail == "drop"):
                break
            if len(of_step) < self.num_packs and self.tail == "wrap":
                again = self._packs(epoch, 0, self.num_packs)
                of_step = [*of_step, *(again * self.num_packs)][: self.num_packs]
            own = of_step[rank::world_size]
            mine += own
            ends.append(sum(map(len, own)) + (ends[-1] if ends else 0))
        return StepPositions(np.concatenate([np.zeros(0, np.int64), *mine]), np.array(ends)) if ends else None

    def hint(self, epoch: int) -> tuple[int, int]:
        """A window, and the packs before it: where the steps that were asked for last begin."""
        return self._known.get(epoch, (0, 0))

    def use_hint(self, epoch: int, hint: tuple[int, int]) -> None:
        """Find later steps from where `hint` says, without packing what lies before."""
        self._known = {epoch: hint}

    def _packs(self, epoch: int, first: int, last: int) -> list[np.ndarray]:
        """The positions in each of the packs first..last-1 of an epoch, or up to its end."""
        window, before = self._known.get(epoch, (0, 0))
        if before > first:
            window, before = 0, 0
        found: list[np.ndarray] = []
        for number, packs in self._windows(epoch, window):
            if before <= first:
                self._known[epoch] = number, before
            found += packs[max(0, first - before) : max(0, last - before)]
            before += len(packs)
            if before >= last:
                break
        return found

    def _windows(self, epoch: int, first: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """The packs of each window from the number `first` on."""
        for number in range(first, -(-self.num_positions // PACKED_TOGETHER)):
            begin = number * PACKED_TOGETHER
            positions_N = np.arange(begin, min(begin + PACKED_TOGETHER, self.num_positions))
            tokens_N = self.tokens_of(epoch, positions_N)
            packs = [positions_N[pack] for pack in packed(tokens_N, self.budget)]
            self.fill.add(epoch, number, len(packs), int(tokens_N.sum()))
            yield number, packs


@dataclass(slots=True)
class Fill:
    """How full packs have been: what was not is padding, or time, that a trainer wastes."""

    num_packs: int = 0
    num_tokens: int = 0
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def add(self, epoch: int, window: int, num_packs: int, num_tokens: int) -> None:
        """Count the packs of a window once."""
        if (epoch, window) not in self._seen:
            self._seen.add((epoch, window))
            self.num_packs += num_packs
            self.num_tokens += num_tokens


def packed(tokens_N: np.ndarray, budget: int) -> list[np.ndarray]:
    """Packs of at most `budget` tokens: the places of their clips, rising, by best fit decreasing (Johnson 1973).

    The longest clips first, each goes to the pack whose room it fills best. Packs are sorted by their first place.
    ValueError where a clip is over the budget.
    """
    order = np.argsort(-tokens_N, kind="stable")
    if tokens_N.size and tokens_N[order[0]] > budget:
        raise ValueError(f"a clip of {tokens_N[order[0]]} tokens is over the budget of {budget}")
    room: list[tuple[int, int]] = []  # room left and number of each open pack, rising
    packs: list[list[int]] = []
    for place, tokens in zip(order.tolist(), tokens_N[order].tolist(), strict=True):
        found = bisect.bisect_left(room, (tokens, -1))
        if found == len(room):
            packs.append([place])
            left, number = budget - tokens, len(packs) - 1
        else:
            left, number = room.pop(found)
            packs[number].append(place)
            left -= tokens
        if left:
            bisect.insort(room, (left, number))
    return [np.array(sorted(pack)) for pack in sorted(packs, key=min)]
