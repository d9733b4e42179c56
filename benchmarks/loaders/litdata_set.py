"""litdata: chunks of samples. Flat numpy arrays were the quickest of what it stores (tensors, bytes, with shapes)."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .samples import BATCH, Batch, Packed, Samples, SetSpec, collate

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask the internet
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.cache import Cache

DECODED_TOGETHER = 16  # in sequence; singly where shuffled: both are quicker than its own choice of 256


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    cache = Cache(str(folder), chunk_bytes="64MB")
    for index in range(spec.num_samples):
        cache[index] = samples.sample(index).reshape(-1)
    cache.done()
    cache.merge()


class Reader:
    """Its dataset and its data loader, which knows how to resume."""

    orders = ("sequential", "shuffled")
    resumes_by = "state"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._spec = spec
        is_shuffled = order == "shuffled"
        num_decoded = 0 if is_shuffled else DECODED_TOGETHER
        dataset = StreamingDataset(str(folder), shuffle=is_shuffled, seed=seed, batch_decode=num_decoded)
        self._singly = StreamingDataset(str(folder), batch_decode=0)
        together = partial(collate, spec=spec)
        self._loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=together)

    def epoch(self, number: int) -> Iterator[Batch]:
        return iter(self._loader)

    def get(self, index: int) -> torch.Tensor:
        one = collate([self._singly[index]], self._spec)
        return one.values if isinstance(one, Packed) else one[0]

    def state(self, num_batches: int) -> Any:
        return self._loader.state_dict()

    def resume(self, state: Any) -> Iterator[Batch]:
        self._loader.load_state_dict(state)
        return iter(self._loader)
