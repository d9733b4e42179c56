"""lance: one dataset, batches scanned in order or taken by row, as Arrow columns (quicker than its torch dataset)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import torch

from .arrow_columns import batch_of, column_type, tables
from .samples import BATCH, Batch, Packed, Samples, SetSpec, permutation


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    schema = pa.schema({"tokens": column_type(spec)})
    batches = (batch for table in tables(spec, samples) for batch in table.to_batches())
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(folder), mode="overwrite")


class Reader:
    """Scans, and rows of a permutation."""

    orders = ("sequential", "shuffled")
    resumes_by = "position"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._spec, self._order, self._seed = spec, order, seed
        self._dataset = lance.dataset(str(folder))

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        if self._order == "sequential":
            scan = self._dataset.to_batches(batch_size=BATCH, offset=first * BATCH)
            yield from (batch_of(batch.column(0), self._spec) for batch in scan)
            return
        order_N = permutation(self._spec, self._seed, number)
        for start in range(first * BATCH, self._spec.num_samples, BATCH):
            yield self._taken(order_N[start : start + BATCH].tolist())

    def _taken(self, rows: list[int]) -> Batch:
        return batch_of(self._dataset.take(rows)["tokens"], self._spec)

    def get(self, index: int) -> torch.Tensor:
        one = self._taken([index])
        return one.values if isinstance(one, Packed) else one[0]

    def state(self, num_batches: int) -> Any:
        return num_batches

    def resume(self, state: Any) -> Iterator[Batch]:
        return self.epoch(0, state)
