"""mosaicml-streaming: MDS shards. Its hashes are checked at download, and not of files that are local."""

import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.feature_extraction_utils
import transformers.tokenization_utils_base  # noqa: F401  before its stand-in, which it would ask about itself

from .samples import BATCH, Batch, Samples, SetSpec, collate


class _Absent(types.ModuleType):
    """Stands for torchvision, which is imported for sets of images: its build for CUDA fails beside a torch without."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[_name] = _Absent(_name)
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    shape = "" if spec.lengths else f":{','.join(map(str, spec.shape))}"
    columns = {"tokens": f"ndarray:{spec.dtype}{shape}"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as writer:
        for index in range(spec.num_samples):
            writer.write({"tokens": samples.sample(index)})


def _collate(samples: list[dict[str, np.ndarray]], spec: SetSpec) -> dict[str, Batch]:
    batch = collate([one["tokens"] for one in samples], spec)
    # The loader counts what it has yielded by the length of the first value.
    return {"number": torch.arange(len(samples)), "tokens": batch}


class Reader:
    """Its dataset and its data loader, which knows how to resume."""

    orders = ("sequential", "shuffled")
    resumes_by = "state"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        is_shuffled = order == "shuffled"
        self._dataset = StreamingDataset(local=str(folder), shuffle=is_shuffled, shuffle_seed=seed, batch_size=BATCH)
        together = partial(_collate, spec=spec)
        self._loader = StreamingDataLoader(self._dataset, batch_size=BATCH, num_workers=0, collate_fn=together)

    def epoch(self, number: int) -> Iterator[Batch]:
        return (batch["tokens"] for batch in self._loader)

    def get(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._dataset[index]["tokens"].copy())

    def state(self, num_batches: int) -> Any:
        return self._loader.state_dict()

    def resume(self, state: Any) -> Iterator[Batch]:
        self._loader.load_state_dict(state)
        return self.epoch(0)
