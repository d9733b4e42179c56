"""The sets that every library reads, and what a library's module has to give.

A module ``<library>_set.py`` has ``write(folder, spec, samples)``, which stores the samples of a set in a folder, and a
class ``Reader`` (below). Every sample says in its first two numbers which one it is, so orders can be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

BATCH = 64
LIBRARIES = ("memmap", "tokenmill", "lance", "huggingface", "litdata", "webdataset", "mosaicml")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSpec:
    """Samples of `shape` each, or (N, *shape) with N from `lengths` where samples differ in length."""

    name: str
    num_samples: int
    shape: tuple[int, ...]
    dtype: str
    codebook_size: int | None = None
    lengths: tuple[int, int] | None = None
    libraries: tuple[str, ...] = LIBRARIES
    is_for_size: bool = False  # nothing else is measured of it

    @property
    def num_tokens_each(self) -> int:
        """Tokens in a sample: codes, or vectors of the last dimension (of sets of one length)."""
        return int(np.prod(self.shape if self.codebook_size else self.shape[:-1]))

    @property
    def width(self) -> int:
        """Numbers in a sample, or in one token where samples differ in length."""
        return int(np.prod(self.shape))


SETS = {
    one.name: one
    for one in (
        SetSpec(name="fsq", num_samples=20_000, shape=(5, 32, 32), dtype="uint16", codebook_size=32_768),
        SetSpec(
            name="fsq18", num_samples=20_000, shape=(5, 32, 32), dtype="int32", codebook_size=262_144,
            libraries=("memmap", "tokenmill"), is_for_size=True,
        ),
        SetSpec(name="kl", num_samples=2_000, shape=(5, 32, 32, 4), dtype="float16"),
        SetSpec(name="traj", num_samples=5_000, shape=(768,), dtype="float16", lengths=(20, 300)),
    )
}  # fmt: skip


class Packed(NamedTuple):
    """Samples of different lengths, one after the other."""

    values: torch.Tensor
    cu_seqlens: torch.Tensor


Batch = torch.Tensor | Packed


class Samples(Protocol):
    """The samples of a set, to be written."""

    def sample(self, index: int) -> np.ndarray:
        """(N,d) or of the set's shape."""
        ...


class Reader(Protocol):
    """A set that is open for reading, in one of the class's `orders` (the first is that of storage)."""

    orders: tuple[str, ...]
    resumes_by: str

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None: ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """Batches of BATCH samples; epochs are asked for in rising order."""
        ...

    def get(self, index: int) -> torch.Tensor:
        """One sample; NotImplementedError where the library cannot."""
        ...

    def state(self, num_batches: int) -> Any:
        """What to keep after so many batches of epoch 0."""
        ...

    def resume(self, state: Any) -> Iterator[Batch]:
        """The rest of epoch 0, in another process."""
        ...


def lengths_of(spec: SetSpec) -> np.ndarray:
    """How many tokens each sample has: evenly spread on a scale of logarithms."""
    low, high = spec.lengths or (1, 1)
    return np.exp(np.random.default_rng(1).uniform(np.log(low), np.log(high), spec.num_samples)).round().astype(int)


def make_sample(spec: SetSpec, index: int, length: int) -> np.ndarray:
    """Sample number `index`: random numbers, but for the first two."""
    rng = np.random.default_rng([2, index])
    shape = (length, *spec.shape) if spec.lengths else spec.shape
    if spec.codebook_size:
        values = rng.integers(0, spec.codebook_size, shape, np.int32).astype(spec.dtype)
    else:
        values = rng.standard_normal(shape, np.float32).astype(spec.dtype)
    values.reshape(-1)[:2] = divmod(index, 1000)
    return values


def ids_of(batch: Batch) -> list[int]:
    """Which samples a batch is of."""
    if isinstance(batch, Packed):
        first = batch.values[batch.cu_seqlens[:-1].long(), :2]
    else:
        first = batch.flatten(1)[:, :2]
    return (first[:, 0].long() * 1000 + first[:, 1].long()).tolist()


def collate(arrays: Sequence[np.ndarray], spec: SetSpec) -> Batch:
    """A batch of single samples, which may come flat."""
    if spec.lengths is None:
        return torch.from_numpy(np.stack(arrays).reshape(-1, *spec.shape))
    arrays = [array.reshape(-1, *spec.shape) for array in arrays]
    return Packed(torch.from_numpy(np.concatenate(arrays)), cu_seqlens_of(list(map(len, arrays))))


def cu_seqlens_of(lengths: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Where each sample of a packed batch begins, and the end of the last."""
    return torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))


def permutation(spec: SetSpec, seed: int, number: int) -> np.ndarray:
    """An order of all samples."""
    return np.random.default_rng([seed, number]).permutation(spec.num_samples)
