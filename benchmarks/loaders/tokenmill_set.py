"""tokenmill: a cache of made-up clips with the samples as its tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenmill
from tokenmill.benchmarks.synthetic import MadeProduct, make_cache
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.tokens import TrajectoryTokens

from .samples import BATCH, Batch, Packed, Samples, SetSpec

SHUFFLES = {"sequential": "none", "window": "window", "global": "global"}
CLIPS_PER_SHARD, TRAJECTORY_CLIPS_PER_SHARD = 5120, 1280
CLIP_FRAMES, PATCHES = 16, (16, 16)


def write(folder: Path, spec: SetSpec, samples: Samples) -> None:
    def values(first: int, count: int) -> Any:
        arrays = [samples.sample(i) for i in range(first, first + count)]
        return [_trajectories(one) for one in arrays] if spec.lengths else np.stack(arrays)

    dtype = "uint16" if spec.codebook_size else spec.dtype
    layout = TokenLayout(dtype=dtype, shape=spec.shape, codebook_size=spec.codebook_size)
    clips_per_shard = TRAJECTORY_CLIPS_PER_SHARD if spec.lengths else CLIPS_PER_SHARD
    products = {spec.name: MadeProduct(layout=layout, values=values)}
    make_cache(str(folder), spec.num_samples, products, clips_per_shard=clips_per_shard)


def _trajectories(values_Nd: np.ndarray) -> TrajectoryTokens:
    """Tokens of as many trajectories, in two chunks, each of which is a run of patches."""
    count = -(-len(values_Nd) // 2)
    numbers = np.arange(len(values_Nd))
    runs_hw = (np.arange(np.prod(PATCHES)) * min(count, 256) // np.prod(PATCHES)).astype(np.uint8).reshape(PATCHES)
    return TrajectoryTokens(
        values_Nd=values_Nd,
        slots_N=numbers % count,
        chunks_N=numbers // count,
        trajectories_N=numbers % count,
        assignment_Thw=np.repeat(runs_hw[None], CLIP_FRAMES, axis=0),
        chunk_frames=CLIP_FRAMES // 2,
        num_valid=CLIP_FRAMES,
    )


class Reader:
    """The loader, and the dataset in map style for single clips."""

    orders = ("sequential", "window", "global")
    resumes_by = "state"

    def __init__(self, folder: Path, spec: SetSpec, order: str, seed: int) -> None:
        self._name = spec.name
        self._cache = tokenmill.open_cache(str(folder))
        self._loader = self._cache.loader(spec.name, BATCH, shuffle=SHUFFLES[order], seed=seed)
        self._dataset: Any = None

    def epoch(self, number: int) -> Iterator[Batch]:
        self._loader.set_epoch(number)
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        for batch in self._loader:
            tokens = batch[self._name]
            yield tokens if isinstance(tokens, torch.Tensor) else Packed(tokens.values, tokens.cu_seqlens)

    def get(self, index: int) -> torch.Tensor:
        if self._dataset is None:
            self._dataset = tokenmill.TokenDataset(self._cache, self._name)
        return self._dataset[index][self._name]

    def state(self, num_batches: int) -> Any:
        return self._loader.state_dict()

    def resume(self, state: Any) -> Iterator[Batch]:
        self._loader.load_state_dict(state)
        return self._batches()
