"""Loaders: the same batches for any number of ranks and workers, resumed at any step, and right to the last byte."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.pipeline.token_file import TokenLayout
from tokenmill.schemas.errors import CacheError

from . import test_cache
from .loader_kit import assert_right, flat, ids_of, make_cache, synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("loader") / "cache"))


@pytest.fixture
def cache(made: str) -> TokenCache:
    return open_cache(made)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("loader") / "other"), 50, seed=1, names=["short", "tracks"])


SETTINGS: list[dict[str, Any]] = [
    {"shuffle": "none"},
    {"shuffle": "window", "window": 100},
    {"shuffle": "global"},
    {"token_budget": 12},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_clip_comes_once_and_batches_do_not_depend_on_the_number_of_ranks(
    cache: TokenCache, settings: dict[str, Any]
) -> None:
    names = ["tracks", "short"]
    alone = TokenLoader(cache, names, 16, seed=5, **settings)
    first, second = ids_of(alone), ids_of(alone)
    assert len(first) == len(alone)
    for epoch in (first, second):
        assert sorted(flat(epoch)) == cache.clips()["clip_id"].to_pylist()
    assert (first == second) == (settings.get("shuffle") == "none")
    for world_size in (2, 4, 8):
        ranks = [
            TokenLoader(cache, names, 16, seed=5, rank=rank, world_size=world_size, **settings)
            for rank in range(world_size)
        ]
        parts = [ids_of(loader) for loader in ranks]
        assert {len(part) for part in parts} == {len(first)}
        for step, whole in enumerate(first):
            assert sorted(flat(part[step] for part in parts)) == sorted(whole)
            if "token_budget" not in settings:
                assert all(part[step] == whole[rank::world_size] for rank, part in enumerate(parts))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("context", "num_workers"), [("fork", 1), ("fork", 3), ("spawn", 2)])
def test_worker_processes_give_the_same_batches_in_the_same_order(
    cache: TokenCache, context: str, num_workers: int
) -> None:
    loader = TokenLoader(cache, ["short", "tracks"], 50, seed=3, columns=["start_s", "caption"])
    alone = list(loader)
    loader.set_epoch(0)
    together = DataLoader(
        loader, batch_size=None, num_workers=num_workers, multiprocessing_context=context, persistent_workers=True
    )
    batches = list(together)
    assert ids_of(batches) == ids_of(alone)
    assert ids_of(together) == ids_of(alone)  # the same epoch again, until set_epoch says otherwise
    for one, wanted in zip(batches, alone, strict=True):
        assert torch.equal(one["short"], wanted["short"])
        assert torch.equal(one["tracks"].values, wanted["tracks"].values)
        assert torch.equal(one["start_s"], wanted["start_s"])
        assert one["caption"] == wanted["caption"]
    loader.set_epoch(1)
    assert ids_of(together) != ids_of(alone)
    assert sorted(flat(ids_of(together))) == sorted(flat(ids_of(alone)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_are_those_of_the_cache(cache: TokenCache, settings: dict[str, Any]) -> None:
    for batch in TokenLoader(cache, ["tracks", "short", "long", "half"], 64, **settings):
        assert_right(cache, batch)
        assert batch["short"].dtype == torch.uint16
        assert batch["long"].dtype == torch.int32
        assert batch["half"].dtype == torch.float16
        assert batch["num_valid"].tolist() == [16] * len(batch["clip_id"])


@pytest.mark.parametrize("settings", [*SETTINGS, {"token_budget": 12, "tail": "wrap"}], ids=str)
def test_a_loader_goes_on_after_any_step_and_with_other_ranks(
    cache: TokenCache, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.pipeline.step_plan.PACKED_TOGETHER", 100)
    loader = TokenLoader(cache, "tracks", 24, seed=9, **settings)
    loader.set_epoch(4)
    states, batches = [loader.state_dict()], []
    for batch in loader:
        states.append(loader.state_dict())
        batches.append(batch["clip_id"])
    following = ids_of(loader)
    for step in (0, 1, 7, len(batches) - 1):
        again = TokenLoader(cache, "tracks", 24, seed=9, **settings)
        again.load_state_dict(pickle.loads(pickle.dumps(states[step])))
        assert ids_of(again) == batches[step:]
        assert ids_of(again) == following
        rest = []
        for rank in range(3):
            part = TokenLoader(cache, "tracks", 24, seed=9, rank=rank, world_size=3, **settings)
            part.load_state_dict(states[step])
            rest.append(ids_of(part))
        assert [sorted(flat(parts)) for parts in zip(*rest, strict=True)] == [sorted(ids) for ids in batches[step:]]


def test_an_epoch_that_was_left_begins_anew(cache: TokenCache) -> None:
    loader = TokenLoader(cache, "short", 100, seed=1)
    whole = ids_of(loader)
    loader.set_epoch(0)
    for batch in loader:
        assert batch["clip_id"] == whole[0]
        break
    assert ids_of(loader) == whole
    assert loader.epoch == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 32}, "batch_size was 16, is 32: give the loader the same batch_size"),
        ({"seed": 2}, "seed was 1, is 2"),
        ({"where": "start_s > 1"}, "data was .*: take a snapshot before a training"),
        ({"shuffle": "global"}, "order was"),
        ({"token_budget": 50}, "token_budget was None, is 50"),
    ],
)
def test_a_state_of_another_loader_is_refused(cache: TokenCache, changed: dict[str, Any], message: str) -> None:
    state = TokenLoader(cache, "short", 16, seed=1).state_dict()
    settings = {"batch_size": 16, "seed": 1, **changed}
    with pytest.raises(CacheError, match=message):
        TokenLoader(cache, "short", **settings).load_state_dict(state)


def test_a_tail_is_kept_dropped_or_filled_up(cache: TokenCache) -> None:
    sizes = {
        tail: [len(ids) for ids in ids_of(TokenLoader(cache, "short", 256, tail=tail))]
        for tail in ("keep", "drop", "wrap")
    }  # type: ignore[arg-type]
    assert sizes == {"keep": [256, 256, 88], "drop": [256, 256], "wrap": [256, 256, 256]}
    wrapped = ids_of(TokenLoader(cache, "short", 256, tail="wrap"))
    assert wrapped[2][88:] == wrapped[0][:168]
    shares = [ids_of(TokenLoader(cache, "short", 512, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [[len(ids) for ids in part] for part in shares] == [[256, 44], [256, 44]]


@pytest.mark.parametrize("budget", [9, 16, 100])
def test_packs_hold_whole_clips_within_the_budget(cache: TokenCache, budget: int) -> None:
    loader = TokenLoader(cache, "tracks", 2, token_budget=budget, tail="drop")
    assert loader.fill is None
    lengths = [batch["tracks"].cu_seqlens.diff() for batch in loader]
    assert all(int(one.sum()) <= 2 * budget for one in lengths)
    total = int(cache.sql("select sum(num_tokens) as n from tokens_tracks")["n"][0].as_py())
    assert sum(int(one.sum()) for one in lengths) >= total - budget
    assert loader.fill is not None
    assert 0.9 < loader.fill <= 1
    for batch in TokenLoader(cache, "short", token_budget=100):
        assert len(batch["clip_id"]) <= 3  # of 32 tokens each


def test_a_clip_over_the_budget_is_refused(cache: TokenCache) -> None:
    with pytest.raises(CacheError, match="a clip has 9 tokens of tokens/tracks, token_budget=8: give a larger budget"):
        TokenLoader(cache, "tracks", token_budget=8)


def test_a_mixture_keeps_its_weights_at_any_time(cache: TokenCache, other: str) -> None:
    small = open_cache(other)
    loader = TokenLoader({cache: 3.0, small: 1.0}, ["short", "tracks"], 20, columns=["start_s"])
    batches = list(loader)
    sources = torch.cat([batch["source"] for batch in batches])
    for end in range(20, len(sources), 20):
        assert abs(int((sources[:end] == 0).sum()) - 0.75 * end) <= 1
    ids = np.array(flat(ids_of(batches)))
    counts = np.unique(ids[sources.numpy() == 1], return_counts=True)[1]
    assert len(counts) == 50  # the small one again and again, evenly
    assert counts.max() - counts.min() <= 1
    assert np.unique(ids[sources.numpy() == 0], return_counts=True)[1].max() == 1
    for batch in batches:
        for source, one in enumerate((cache, small)):
            chosen = (batch["source"] == source).nonzero().flatten().tolist()
            own = [batch["clip_id"][i] for i in chosen]
            assert torch.equal(batch["short"][chosen].int(), one.read("short", own))
            values, cu_seqlens, _ = batch["tracks"]
            for i, wanted in zip(chosen, one.read_trajectories("tracks", own), strict=True):
                assert np.array_equal(values[cu_seqlens[i] : cu_seqlens[i + 1]].numpy(), wanted.values_Nd)
    following = ids_of(loader)
    again = np.array(flat(following))
    assert set(cache.clips()["clip_id"].to_pylist()) <= {*ids, *again}  # the large one goes on where it was


def test_columns_are_tensors_of_numbers_or_lists(cache: TokenCache) -> None:
    columns = {"start_s": "start_s", "text": "upper(c.caption)", "late": "start_s > 5", "maybe": "nullif(start_s, 0)"}
    rows = {row["clip_id"]: row for row in cache.clips().to_pylist()}
    for batch in TokenLoader(cache, "short", 64, columns=columns, where="start_s < 10"):
        wanted = [rows[clip_id] for clip_id in batch["clip_id"]]
        assert batch["start_s"].tolist() == [row["start_s"] for row in wanted]
        assert batch["text"] == [row["caption"].upper() for row in wanted]
        assert batch["late"].tolist() == [row["start_s"] > 5 for row in wanted]
        assert batch["maybe"] == [row["start_s"] or None for row in wanted]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "give batch_size, or token_budget, from 1 on: found batch_size=None"),
        ({"shuffle": "yes"}, "shuffle='yes': accepted are none, window, global"),
        ({"tail": "cut"}, "tail='cut': accepted are keep, drop, wrap"),
        ({"rank": 1}, "give both of rank and world_size"),
        ({"rank": 2, "world_size": 2}, "rank must be 0 to world_size - 1"),
        ({"rank": 0, "world_size": 3}, "batch_size=16 is of the global batch: 3 ranks must divide it"),
        ({"products": []}, "one or more different names are accepted"),
    ],
)
def test_settings_that_cannot_be_are_refused(cache: TokenCache, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLoader(cache, **{"products": "short", "batch_size": 16, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": "start_s < 0"}, "no clip has tokens/short where start_s < 0"),
        ({"where": "nothing = 1"}, "the query failed: .*nothing"),
        ({"products": "shorts"}, "no product tokens/shorts .did you mean 'short'"),
        ({"columns": ["clip_id"]}, "columns: clip_id would be twice in a batch"),
    ],
)
def test_what_a_cache_does_not_have_is_said(cache: TokenCache, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        TokenLoader(cache, **{"products": "short", "batch_size": 16, **settings})


def test_all_kinds_of_grids_come_as_they_are_stored(tmp_path: Path) -> None:
    url = str(tmp_path / "real")
    test_cache.make_cache(url)
    real = open_cache(url)
    loader = TokenLoader(real, ["dct", "mean", "levels", "native"], 8)
    for batch in loader:
        for name in ("dct", "mean", "levels", "native"):
            wanted = real.read(name, batch["clip_id"])
            assert torch.equal(batch[name].to(wanted.dtype), wanted), name
    for batch in TokenLoader(real, "levels", 8, levels=1):
        assert torch.equal(batch["levels"].int(), real.read("levels", batch["clip_id"])[..., :1])
    with pytest.raises(CacheError, match="tokens/levels: 3 levels were asked for: it has 1 to 2"):
        TokenLoader(real, "levels", 8, levels=3)


def test_names_of_columns_cannot_change_what_a_batch_has(cache: TokenCache) -> None:
    columns = {"first_0": "1", "count_0": "1", "_id": "2", "a": "3", "A": "4", 'q"': "5 -- five"}
    for batch in TokenLoader(cache, "short", 64, columns=columns):
        assert_right(cache, batch)
        assert [int(batch[name][0]) for name in columns] == [1, 1, 2, 3, 4, 5]


def test_caches_that_store_a_product_otherwise_do_not_mix(cache: TokenCache, tmp_path: Path) -> None:
    made = synthetic()
    layout = TokenLayout(dtype="uint16", shape=(1, 4, 4), codebook_size=1 << 15)
    product = made.MadeProduct(layout=layout, values=lambda first, count: np.zeros((count, 1, 4, 4), np.int64))
    made.make_cache(str(tmp_path / "flat"), 10, {"short": product})
    with pytest.raises(CacheError, match="short: caches of a mixture must store it alike"):
        TokenLoader({cache: 1, open_cache(str(tmp_path / "flat")): 1}, "short", 8)
    with pytest.raises(ValueError, match="weights of caches must be above 0"):
        TokenLoader({cache: 0}, "short", 8)


def test_a_loader_of_a_snapshot_does_not_see_what_came_later(cache: TokenCache, made: str) -> None:
    number = cache.snapshot()
    pinned = open_cache(made, number)
    assert TokenLoader(pinned, "short", 8).state_dict()["data"] == TokenLoader(cache, "short", 8).state_dict()["data"]


def test_lists_of_clips_are_made_once(cache: TokenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(3):
        TokenLoader(cache, "short", 8, where="start_s > 2")
    assert len(list((tmp_path / "tokenmill" / "clips").glob("*.arrow"))) == 1
