"""Caches of made-up tokens for tests of loaders, and batches to compare."""

import importlib.util
import itertools
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.tokens import TrajectoryTokens

SYNTHETIC = Path(__file__).parents[2] / "benchmarks" / "synthetic.py"
CLIPS, CLIPS_PER_SHARD = 600, 128
GROUP_BYTES = 2048  # so that files have many row groups
DIM = 6


def codes(first: int, count: int, below: int = 1 << 15) -> np.ndarray:
    return np.random.default_rng(first).integers(0, below, (count, 2, 4, 4))


def latents(first: int, count: int) -> np.ndarray:
    return np.random.default_rng(first + 1).standard_normal((count, 2, 3, 3, 4)).astype(np.float16)


def tracks(first: int, count: int) -> list[TrajectoryTokens]:
    rng = np.random.default_rng(first + 2)
    return [_track(rng, int(num_tokens)) for num_tokens in rng.integers(1, 10, count)]


def _track(rng: np.random.Generator, num_tokens: int) -> TrajectoryTokens:
    numbers = np.arange(num_tokens)
    return TrajectoryTokens(
        values_Nd=rng.standard_normal((num_tokens, DIM)).astype(np.float16),
        slots_N=numbers,
        chunks_N=np.zeros(num_tokens, np.int64),
        trajectories_N=numbers,
        assignment_Thw=np.arange(16 * 4).reshape(16, 2, 2).astype(np.uint8) % num_tokens,
        chunk_frames=16,
        num_valid=16,
        mass_N=None,
    )


def make_cache(
    url: str, num_clips: int = CLIPS, seed: int = 0, names: Iterable[str] = ("short", "long", "half", "tracks")
) -> str:
    """A cache of products: codes of 15 and of 18 bits, latents, and trajectories of 1 to 9 tokens."""
    made, grid = synthetic(), (2, 4, 4)
    products = {
        "short": made.MadeProduct(layout=TokenLayout(dtype="uint16", shape=grid, codebook_size=1 << 15), values=codes),
        "long": made.MadeProduct(
            layout=TokenLayout(dtype="uint16", shape=grid, codebook_size=1 << 18),
            values=lambda first, count: codes(first, count, 1 << 18),
        ),
        "half": made.MadeProduct(
            layout=TokenLayout(dtype="float16", shape=(2, 3, 3, 4), codebook_size=None), values=latents
        ),
        "tracks": made.MadeProduct(
            layout=TokenLayout(dtype="float16", shape=(DIM,), codebook_size=None), values=tracks
        ),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenmill.pipeline.token_file.ROW_GROUP_BYTES", GROUP_BYTES)
        patch.setattr("tokenmill.pipeline.trajectory_file.ROW_GROUP_BYTES", GROUP_BYTES)
        chosen = {name: products[name] for name in names}
        made.make_cache(url, num_clips, chosen, clips_per_shard=CLIPS_PER_SHARD, seed=seed)
    return url


def synthetic() -> Any:
    """The module of the benchmarks that makes caches."""
    spec = importlib.util.spec_from_file_location("synthetic_caches", SYNTHETIC)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ids_of(batches: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [batch["clip_id"] for batch in batches]


def flat(parts: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


def assert_right(cache: TokenCache, batch: dict[str, Any]) -> None:
    """Every product of a batch is what TokenCache.read gives of its clips."""
    ids = batch["clip_id"]
    for name in ("short", "long", "half"):
        if name in batch:
            wanted = cache.read(name, ids)
            assert torch.equal(batch[name].to(wanted.dtype), wanted)
    if "tracks" in batch:
        values, cu_seqlens, max_seqlen = batch["tracks"]
        wanted = [one.values_Nd for one in cache.read_trajectories("tracks", ids)]
        assert np.array_equal(values.numpy(), np.concatenate(wanted))
        assert cu_seqlens.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
        assert max_seqlen == max(map(len, wanted))


def copied(url: str, tmp_path: Path) -> Path:
    """A copy of a cache that a test may damage."""
    return Path(shutil.copytree(url, tmp_path / "copy"))


def opened(url: str) -> TokenCache:
    return open_cache(url)
