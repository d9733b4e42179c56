"""Values whose places in memory are known, gathered when a batch is made of them."""

import itertools
from collections.abc import Sequence

import numpy as np

from .address_range import AddressRange, Buffers

LONG_RUN = 16 << 10  # bytes that are copied sooner by themselves than as rows among others


class MappedColumn:
    """The places (V,) of values in a column, and their runs: values that lie one after the other are copied at once."""

    def __init__(self, name: str, width: int, places_V: np.ndarray) -> None:
        self.name, self.width, self.places_V = name, width, places_V
        begins = np.diff(places_V, prepend=places_V[:1] - width - 1) != width
        self._run_V = np.cumsum(begins) - 1  # the number of each value's run
        self._begins_R = np.flatnonzero(begins)

    def gather(self, addresses: AddressRange, buffers: Buffers, begin: int, end: int) -> np.ndarray:
        """A copy (end - begin, width) uint8 of values begin..end-1."""
        if end == begin:
            return np.zeros((0, self.width), np.uint8)
        first, last = int(self._run_V[begin]), int(self._run_V[end - 1])
        if (last - first) * LONG_RUN > (end - begin) * self.width:
            return addresses.gather(self.places_V[begin:end], self.width)
        found = buffers.take(end - begin, self.width)
        bounds = [begin, *self._begins_R[first + 1 : last + 1].tolist(), end]
        for one, following in itertools.pairwise(bounds):
            addresses.copy(int(self.places_V[one]), found[one - begin : following - begin])
        return found


class MappedValues:
    """Values whose places in memory are known: a part of them is gathered when it is asked for."""

    def __init__(self, addresses: AddressRange, buffers: Buffers, columns: Sequence[MappedColumn]) -> None:
        self._range, self._buffers, self._columns = addresses, buffers, columns

    def planes(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """The bytes (end - begin, width) of each column of values begin..end-1."""
        return {column.name: self.plane(begin, end, i) for i, column in enumerate(self._columns)}

    def plane(self, begin: int, end: int, column: int = 0) -> np.ndarray:
        """Those of one column by its number."""
        return self._columns[column].gather(self._range, self._buffers, begin, end)

    def page_in(self) -> bool:
        """Have all of them in memory; False where some were not, as it seems."""
        return all([self._range.page_in(column.places_V, column.width) for column in self._columns])


def runs(firsts_N: np.ndarray, counts_N: np.ndarray, step: int = 1) -> np.ndarray:
    """The numbers first, first + step, ... of each run, one run after the other."""
    ends_N = np.cumsum(counts_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    found = np.arange(total) * step
    found += np.repeat(firsts_N - (ends_N - counts_N) * step, counts_N)
    return found
