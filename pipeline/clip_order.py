"""The order of an epoch: which clip stands at each position, computed from the position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .permutation import key_of, permuted

Shuffle = Literal["none", "window", "global"]
PERIOD = 1 << 16  # positions after which the schedule of a mixture repeats: shares are multiples of 1 / PERIOD


@dataclass(frozen=True)
class ClipOrder:
    """The order of the clips of one source, or of a mixture of several by weight.

    `sizes` are the clips of each source, numbered as they lie in files. ``global`` permutes all of a source;
    ``window`` permutes runs of `run` clips, then the clips of about `window` clips in a row together, so that few files
    are open at once; ``none`` leaves them as they lie. An epoch has as many positions as there are clips. Of a mixture,
    sources follow each other by a fixed schedule of their weights: small ones are begun anew when they are through,
    in another order, and large ones go on in the next epoch.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: Shuffle
    window: int
    run: int

    @property
    def num_positions(self) -> int:
        """Positions in an epoch."""
        return sum(self.sizes)

    def clips(self, epoch: int, positions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of the clip at each position of an epoch, and the clip's number in it, both int64 (N,)."""
        if len(self.sizes) == 1:
            return np.zeros(len(positions_N), np.int64), self._shuffled(0, epoch, positions_N)
        cycles_N, places_N = np.divmod(epoch * self.num_positions + positions_N, PERIOD)
        schedule, ranks, counts = self._schedule
        sources_N, numbers_N = schedule[places_N], np.empty(len(positions_N), np.int64)
        for source, size in enumerate(self.sizes):
            chosen = np.flatnonzero(sources_N == source)
            taken_N = cycles_N[chosen] * counts[source] + ranks[places_N[chosen]]
            passes_N, within_N = np.divmod(taken_N, size)
            for one in np.unique(passes_N).tolist():
                of_pass = passes_N == one
                numbers_N[chosen[of_pass]] = self._shuffled(source, one, within_N[of_pass])
        return sources_N, numbers_N

    @cached_property
    def _schedule(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each place of a period its source, how many of that source come before it, and each source's count."""
        counts = shares(self.weights, PERIOD)
        # The k-th of n stands at (k + 1/2) / n of the period: as evenly spread as can be.
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        sources = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(n) for n in counts])
        in_time = np.lexsort((sources, times))
        return sources[in_time], ranks[in_time], counts

    def _shuffled(self, source: int, epoch: int, positions_N: np.ndarray) -> np.ndarray:
        size = self.sizes[source]
        if self.shuffle == "none":
            return positions_N
        key = key_of(self.seed, epoch, source)
        if self.shuffle == "global":
            return permuted(positions_N, size, key)
        run = min(self.run, size)
        window = max(1, self.window // run) * run
        windows_N, found_N = positions_N // window, np.empty_like(positions_N)
        for number in range(int(windows_N.min(initial=0)), int(windows_N.max(initial=-1)) + 1):
            chosen = np.flatnonzero(windows_N == number)
            begin = number * window
            end = min(begin + window, size)
            mixed_N = permuted(positions_N[chosen] - begin, end - begin, key_of(self.seed, epoch, source, begin))
            found_N[chosen] = self._moved(begin, end, size, key)[mixed_N]
        return found_N

    def _moved(self, begin: int, end: int, size: int, key: int) -> np.ndarray:
        """The clips of the runs that stand at places begin..end-1; clips that are left over stay the last."""
        run = min(self.run, size)
        runs = np.arange(begin // run, -(-end // run))
        whole = runs < size // run
        runs[whole] = permuted(runs[whole], size // run, key)
        return (runs[:, None] * run + np.arange(run)).reshape(-1)[: end - begin]


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided by weight into whole numbers, the largest remainders rounded up; each is 1 or more."""
    exact = np.asarray(weights, np.float64) * total / sum(weights)
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := total - counts.sum()) != 0:
        order = np.argsort(counts - exact, kind="stable")  # the furthest below its share first
        if missing > 0:
            counts[order[: min(missing, len(counts))]] += 1
        else:
            counts[order[-1]] -= 1
    return counts
