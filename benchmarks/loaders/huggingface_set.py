"""Hugging Face datasets: an Arrow file in map style, batches taken as Arrow columns (its quickest format)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

from .arrow_columns import batch_of, tables
from .samples import BATCH, Batch, Packed, Samples, SetSpec, permutation

datasets.disable_progress_bars()


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    datasets.Dataset(pa.concat_tables(tables(spec, samples))).save_to_disk(str(folder))


class Reader:
    """Slices, and rows of a permutation."""

    orders = ("sequential", "shuffled")
    resumes_by = "position"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._spec, self._order, self._seed = spec, order, seed
        self._dataset = datasets.load_from_disk(str(folder)).with_format("arrow")

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        order_N = permutation(self._spec, self._seed, number) if self._order == "shuffled" else None
        for start in range(first * BATCH, self._spec.num_samples, BATCH):
            chosen = slice(start, start + BATCH) if order_N is None else order_N[start : start + BATCH].tolist()
            yield batch_of(self._dataset[chosen]["tokens"], self._spec)

    def get(self, index: int) -> torch.Tensor:
        one = batch_of(self._dataset[index]["tokens"], self._spec)
        return one.values if isinstance(one, Packed) else one[0]

    def state(self, num_batches: int) -> Any:
        return num_batches

    def resume(self, state: Any) -> Iterator[Batch]:
        return self.epoch(0, state)
