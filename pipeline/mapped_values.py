"""Values whose places in memory are known, gathered when a batch is made of them."""

import bisect

import numpy as np

from .address_range import AddressRange

LONG_RUN = 16 << 10  # bytes that are copied sooner by themselves than as rows among others


class MappedColumn:
    """The places (V,) of values of `width` bytes in a column.

    Where most lie one after the other, runs of them are copied, else value by value: what is sooner.
    """

    def __init__(self, addresses: AddressRange, width: int, places_V: np.ndarray) -> None:
        self._addresses, self.width, self.places_V = addresses, width, places_V
        self._rows = addresses.rows(width)
        is_begin = np.diff(places_V, prepend=places_V[:1] - width - 1) != width
        self._is_of_runs = np.count_nonzero(is_begin) * LONG_RUN <= len(places_V) * width
        if self._is_of_runs:
            begins_R = np.flatnonzero(is_begin)
            starts_R = places_V[begins_R]
            self._begins: list[int] = begins_R.tolist()
            self._starts: list[int] = starts_R.tolist()
            self._stops: list[int] = (starts_R + np.diff(begins_R, append=len(places_V)) * width).tolist()

    def gather(self, begin: int, end: int) -> np.ndarray:
        """A copy (end - begin,) of values begin..end-1, each of which is a void of `width` bytes."""
        if not self._is_of_runs or begin == end:
            return self._rows[self.places_V[begin:end]]
        first, last = bisect.bisect_right(self._begins, begin) - 1, bisect.bisect_left(self._begins, end)
        starts, stops = self._starts[first:last], self._stops[first:last]
        starts[0] += (begin - self._begins[first]) * self.width
        stops[-1] = self._starts[last - 1] + (end - self._begins[last - 1]) * self.width
        found, data = self._addresses.buffers.take((end - begin) * self.width), self._addresses.bytes
        parts = [data[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return np.concatenate(parts, out=found).view(self._rows.dtype)

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
