"""Clips of a cache by number."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.dataset import TokenDataset

from .loader_kit import CLIPS, flat, ids_of, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return open_cache(make_cache(str(tmp_path_factory.mktemp("dataset") / "cache")))


def test_every_clip_is_found_by_number_with_all_that_was_asked_for(cache: TokenCache) -> None:
    dataset = TokenDataset(cache, ["short", "long", "half", "tracks"], columns=["start_s", "caption"])
    rows = {row["clip_id"]: row for row in cache.clips().to_pylist()}
    assert len(dataset) == CLIPS
    assert len({dataset[i]["clip_id"] for i in range(CLIPS)}) == CLIPS
    for i in (0, 5, CLIPS - 1, -1):
        sample = dataset[i]
        ids = [sample["clip_id"]]
        for name in ("short", "long", "half"):
            wanted = cache.read(name, ids)[0]
            assert torch.equal(sample[name].to(wanted.dtype), wanted)
        assert np.array_equal(sample["tracks"].numpy(), cache.read_trajectories("tracks", ids)[0].values_Nd)
        assert sample["caption"] == rows[ids[0]]["caption"]
        assert float(sample["start_s"]) == rows[ids[0]]["start_s"]
        assert sample["num_valid"] == 16
    with pytest.raises(IndexError, match=f"there are {CLIPS} clips, asked for number {CLIPS}"):
        dataset[CLIPS]


def test_it_feeds_a_dataloader_with_a_sampler(cache: TokenCache) -> None:
    dataset = TokenDataset(cache, "short", where="start_s < 100")
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    ids = flat(ids_of(batches))
    assert sorted(ids) == cache.clips("start_s < 100")["clip_id"].to_pylist()
    assert torch.equal(torch.cat([batch["short"] for batch in batches]).int(), cache.read("short", ids))


def test_it_travels_without_its_cache(cache: TokenCache) -> None:
    dataset = TokenDataset(cache, "tracks")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[7]["clip_id"] == dataset[7]["clip_id"]
    assert torch.equal(copy[7]["tracks"], dataset[7]["tracks"])
