"""Values whose places in memory are known, gathered when a batch is made of them."""

import bisect
import itertools

import numpy as np

from .address_range import AddressRange

LONG_RUN = 128 << 10  # bytes that are copied sooner by themselves than as rows among others


class MappedColumn:
    """The places (V,) of values of `width` bytes in a column.

    Where most lie one after the other, runs of them are copied, else value by value: what is sooner.
    """

    def __init__(self, addresses: AddressRange, width: int, places_V: np.ndarray) -> None:
        self._addresses, self.width, self.places_V = addresses, width, places_V
        self._rows = addresses.rows(width)
        is_break = np.diff(places_V) != width
        num_runs = np.count_nonzero(is_break) + 1
        is_of_runs = num_runs * LONG_RUN <= len(places_V) * width
        self._breaks = (np.flatnonzero(is_break) + 1).tolist() if is_of_runs else None

    def gather(self, begin: int, end: int) -> np.ndarray:
        """A copy (end - begin,) of values begin..end-1, each of which is a void of `width` bytes."""
        if self._breaks is None:
            return self._rows[self.places_V[begin:end]]
        found = self._addresses.buffers.take((end - begin) * self.width)
        first, last = bisect.bisect_right(self._breaks, begin), bisect.bisect_left(self._breaks, end)
        for one, following in itertools.pairwise([begin, *self._breaks[first:last], end]):
            out = found[(one - begin) * self.width : (following - begin) * self.width]
            self._addresses.copy(int(self.places_V[one]), out)
        return found.view(self._rows.dtype)

    def page_in(self) -> bool:
        """Have all of them in memory; False where some were not, as it seems."""
        return self._addresses.page_in(self.places_V, self.width)


def runs(firsts_N: np.ndarray, counts_N: np.ndarray, step: int = 1) -> np.ndarray:
    """The numbers first, first + step, ... of each run, one run after the other."""
    ends_N = np.cumsum(counts_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    found = np.arange(total) * step
    found += np.repeat(firsts_N - (ends_N - counts_N) * step, counts_N)
    return found
