"""Snapshots on every kind of store, and many writers at once."""

import threading
from pathlib import Path

import pytest

from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.cache_head import read_info, register_products
from tokenmill.pipeline.snapshots import live_state, pinned_manifests, read_snapshot, snapshot_numbers, take_snapshot
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.cache_info import ProductInfo
from tokenmill.schemas.errors import CacheError

from ..conftest import Store
from .test_cache import make_cache


def test_a_snapshot_is_two_small_files_and_reads_back_what_was_committed(store: Store) -> None:
    make_cache(f"{store.url}/cache")
    folder = Folder(f"{store.url}/cache")
    snapshot, is_new = take_snapshot(folder)
    assert (snapshot.number, is_new) == (1, True)
    assert take_snapshot(folder) == (snapshot, False)
    assert folder.list("snapshots") == ["snapshots/1.json", snapshot.manifests]
    assert read_snapshot(folder, 1) == snapshot
    committed = sorted(live_state(folder).manifests, key=lambda manifest: manifest.name)
    assert pinned_manifests(folder, snapshot) == committed
    assert snapshot.num_manifests == len(committed) > 10
    assert committed[0].shard_id not in folder.read("snapshots/1.json").decode()
    for manifest in committed:
        folder.remove(manifest.name)
    pinned = open_cache(f"{store.url}/cache", snapshot=1)
    ids = pinned.clips()["clip_id"].to_pylist()
    assert len(ids) > 10
    assert len(pinned.read("dct", ids)) == len(ids)
    assert open_cache(f"{store.url}/cache").clips().num_rows == 0


def test_racing_writers_of_other_states_get_other_numbers(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    taken: list[int] = []

    def race(i: int) -> None:
        folder = Folder(str(tmp_path / "cache"))
        register_products(folder, {f"tokens/new_{i}": ProductInfo(fingerprint=str(i))})
        taken.append(take_snapshot(folder)[0].number)

    racers = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    folder = Folder(str(tmp_path / "cache"))
    numbers = snapshot_numbers(folder)
    assert sorted(set(taken)) == numbers == list(range(1, len(numbers) + 1))
    states = [read_snapshot(folder, number).state for number in numbers]
    assert len(set(states)) == len(states)
    assert {f"tokens/new_{i}" for i in range(8)} <= set(read_info(folder).products)


def test_jobs_that_add_products_at_once_lose_none_and_the_last_version_counts(store: Store) -> None:
    folder = Folder(store.url)
    folder.create("cache.json", b'{"format_version": 1, "recipe": {}}')
    threads = [
        threading.Thread(
            target=register_products,
            args=(
                Folder(store.url),
                {"clips": ProductInfo(fingerprint="c"), f"tokens/p{i}": ProductInfo(fingerprint="t")},
            ),
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_info(folder).products) == {"clips", *(f"tokens/p{i}" for i in range(6))}
    assert len(folder.list("products/clips")) == 1
    for fingerprint in ("v2", "v2", "t"):
        register_products(folder, {"tokens/p1": ProductInfo(fingerprint=fingerprint, shape=(2, 3))})
        assert read_info(folder).products["tokens/p1"] == ProductInfo(fingerprint=fingerprint, shape=(2, 3))
    assert folder.list("products/tokens/p1") == [f"products/tokens/p1/{n}.json" for n in (1, 2, 3)]


def test_a_damaged_version_of_a_product_is_followed_by_a_whole_one(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.create("cache.json", b'{"format_version": 1, "recipe": {}}')
    register_products(folder, {"clips": ProductInfo(fingerprint="c")})
    (tmp_path / "products" / "clips" / "1.json").write_bytes(b"{")
    with pytest.raises(CacheError, match=r"clips/1.json: damaged .* run the recipe that made it to write it anew"):
        read_info(folder)
    register_products(folder, {"clips": ProductInfo(fingerprint="c")})
    assert read_info(folder).fingerprints == {"clips": "c"}


def test_a_damaged_snapshot_is_named_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    snapshot, _ = take_snapshot(folder)
    path = tmp_path / "cache" / snapshot.name
    whole = path.read_bytes()
    path.write_bytes(b"{")
    with pytest.raises(CacheError, match=r"snapshots/1.json: damaged snapshot"):
        open_cache(folder.url, snapshot=1)
    assert take_snapshot(folder)[0].number == 2
    path.write_bytes(whole)
    (tmp_path / "cache" / snapshot.manifests).write_bytes(b"torn")
    with pytest.raises(CacheError, match=r"manifests-.*: damaged .* snapshot 1 can no longer be read, take a new one"):
        open_cache(folder.url, snapshot=1).clips()


def test_an_unknown_snapshot_lists_those_that_exist(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="no snapshot 1; it has none: tokenmill snapshot CACHE"):
        open_cache(str(tmp_path / "cache"), snapshot=1)
    take_snapshot(Folder(str(tmp_path / "cache")))
    with pytest.raises(CacheError, match="no snapshot 3; there are 1"):
        open_cache(str(tmp_path / "cache"), snapshot=3)
