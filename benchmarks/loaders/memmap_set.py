"""np.memmap: the limit of what can be read. Samples of different lengths lie flat, with their offsets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .samples import BATCH, Batch, Packed, Samples, SetSpec, cu_seqlens_of, lengths_of, make_sample, permutation


def write(folder: Path, spec: SetSpec, samples: Samples | None) -> None:
    """Make the samples: the other libraries write what this one reads."""
    assert samples is None
    lengths_N = lengths_of(spec)
    with open(folder / "values.bin", "wb") as stream:
        for index in range(spec.num_samples):
            stream.write(make_sample(spec, index, int(lengths_N[index])).tobytes())
    if spec.lengths:
        np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths_N)))


class Reader:
    """Slices, and gathers by a permutation."""

    orders = ("sequential", "shuffled")
    resumes_by = "position"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._spec, self._order, self._seed = spec, order, seed
        mapped = np.memmap(folder / "values.bin", spec.dtype, "r").reshape(-1, *spec.shape)
        self._values = mapped.view(np.ndarray)  # without np.memmap's own cost of every slice
        self._offsets = np.load(folder / "offsets.npy") if spec.lengths else None

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        num_samples = self._spec.num_samples
        order_N = permutation(self._spec, self._seed, number) if self._order == "shuffled" else None
        for start in range(first * BATCH, num_samples, BATCH):
            stop = min(start + BATCH, num_samples)
            if self._offsets is not None:
                yield self._packed(order_N, start, stop)
            elif order_N is None:
                yield torch.from_numpy(np.array(self._values[start:stop]))
            else:
                yield torch.from_numpy(self._values[order_N[start:stop]])

    def _packed(self, order_N: np.ndarray | None, start: int, stop: int) -> Packed:
        offsets = self._offsets
        assert offsets is not None
        if order_N is None:
            values = np.array(self._values[offsets[start] : offsets[stop]])
            return Packed(torch.from_numpy(values), cu_seqlens_of(np.diff(offsets[start : stop + 1])))
        rows = order_N[start:stop]
        values = np.concatenate([self._values[offsets[i] : offsets[i + 1]] for i in rows.tolist()])
        return Packed(torch.from_numpy(values), cu_seqlens_of(offsets[rows + 1] - offsets[rows]))

    def sample(self, index: int) -> np.ndarray:
        """A copy of one sample."""
        if self._offsets is None:
            return np.array(self._values[index])
        return np.array(self._values[self._offsets[index] : self._offsets[index + 1]])

    def get(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.sample(index))

    def state(self, num_batches: int) -> Any:
        return num_batches

    def resume(self, state: Any) -> Iterator[Batch]:
        return self.epoch(0, state)
