"""webdataset: tars of one .npy for each sample; shuffled by shards and a buffer of 1,000 samples."""

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from .samples import BATCH, Batch, Samples, SetSpec, collate

BUFFER, SHARD_BYTES = 1000, 64 << 20


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    with wds.ShardWriter(str(folder / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for index in range(spec.num_samples):
            writer.write({"__key__": f"{index:08d}", "npy": samples.sample(index)})


def _collate(samples: list[tuple[Any, ...]], spec: SetSpec) -> Batch:
    return collate([tokens for (tokens,) in samples], spec)


class Reader:
    """Its pipeline. It keeps no state: to resume is to read again, and throw away, all that came before."""

    orders = ("sequential", "shuffled")
    resumes_by = "reading again"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._urls = sorted(map(str, folder.glob("*.tar")))
        self._spec, self._order, self._seed = spec, order, seed

    def epoch(self, number: int) -> Iterator[Batch]:
        rng, urls = random.Random(f"{self._seed} {number}"), list(self._urls)
        if self._order == "shuffled":
            rng.shuffle(urls)
        dataset = wds.WebDataset(urls, shardshuffle=False)
        if self._order == "shuffled":
            dataset = dataset.shuffle(BUFFER, rng=rng)
        together = partial(_collate, spec=self._spec)
        return iter(dataset.decode().to_tuple("npy").batched(BATCH, collation_fn=together))

    def get(self, index: int) -> torch.Tensor:
        raise NotImplementedError("tars are read from the beginning")

    def state(self, num_batches: int) -> Any:
        return num_batches

    def resume(self, state: Any) -> Iterator[Batch]:
        return islice(self.epoch(0), state, None)
