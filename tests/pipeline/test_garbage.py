"""Garbage is what nothing names, and nothing else is ever removed."""

import os
import time
from pathlib import Path

import pytest

from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.cache_head import register_products
from tokenmill.pipeline.garbage import Garbage, find_garbage, remove_garbage
from tokenmill.pipeline.manifests import compact_manifests
from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import write_plan
from tokenmill.pipeline.snapshots import take_snapshot
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.cache_info import ProductInfo
from tokenmill.schemas.errors import CacheError

from ..conftest import Store
from .test_cache import make_cache
from .test_plan import MANY, recipe

LEFT = {
    "data": ["clips/0123456789abcdef-0123456789ab.parquet", "tokens/dct/0123456789abcdef-0123456789ab.parquet"],
    "packed": [],
    "plan": ["plan/clips-0123456789ab.parquet", "plan/videos-0123456789ab.parquet"],
    "snapshot": ["snapshots/manifests-0123456789ab.parquet"],
    "leftover": [
        ".staging/host-17-0a1b2c3d/x.parquet",
        ".probe-0a1b2c3d",
        ".cache.json.0a1b2c3d",
        "manifests/clips/.x.json.0a1b2c3d",
        ".index-abc/index",
    ],
}


def found_in(garbage: list[Garbage]) -> dict[str, list[str]]:
    return {kind: sorted(g.file.name for g in garbage if g.kind == kind) for kind in {g.kind for g in garbage}}


def test_only_what_nothing_names_is_found_and_removed(store: Store) -> None:
    make_cache(f"{store.url}/cache")
    folder = Folder(f"{store.url}/cache")
    open_cache(folder.url).clips()
    take_snapshot(folder)
    compact_manifests(folder, at_least=1)
    assert find_garbage(folder, 0) == []
    before = set(folder.list(""))
    for names in LEFT.values():
        for name in names:
            store.put(f"cache/{name}", b"left over")
    store.put("cache/notes.txt", b"not ours to judge")
    assert find_garbage(folder, 3600) == []
    garbage = find_garbage(folder, 0)
    assert found_in(garbage) == {kind: sorted(names) for kind, names in LEFT.items() if names}
    assert list(remove_garbage(folder, garbage, 3600)) == []
    assert list(remove_garbage(folder, garbage, 0)) == garbage
    assert set(folder.list("")) == before | {"notes.txt"}
    assert not folder.is_local or not Path(folder.path(".staging")).exists()


def test_a_file_that_is_published_again_in_time_stays(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    names = LEFT["data"]
    for name in names:
        (tmp_path / "cache" / name).write_bytes(b"data")
        os.utime(tmp_path / "cache" / name, (time.time() - 7200,) * 2)
    garbage = find_garbage(folder, 3600)
    assert [one.file.name for one in garbage] == names
    os.utime(tmp_path / "cache" / names[0])
    (tmp_path / "cache" / names[1]).unlink()
    assert list(remove_garbage(folder, garbage, 3600)) == []
    assert (tmp_path / "cache" / names[0]).exists()


def test_a_file_that_is_committed_in_time_stays(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    manifest = next((tmp_path / "cache" / "manifests" / "clips").iterdir())
    data = manifest.read_bytes()
    manifest.unlink()
    garbage = find_garbage(folder, 0)
    assert [one.kind for one in garbage] == ["data"]
    manifest.write_bytes(data)
    assert list(remove_garbage(folder, garbage, 0)) == []
    assert (tmp_path / "cache" / garbage[0].file.name).exists()


@pytest.mark.parametrize("what", ["manifests/clips", "plan", "snapshots"])
def test_nothing_is_garbage_while_what_is_needed_cannot_be_read(tmp_path: Path, what: str) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    take_snapshot(folder)
    next((tmp_path / "cache" / what).glob("*.json")).write_bytes(b"{")
    with pytest.raises(CacheError, match="damaged"):
        find_garbage(folder, 0)


def test_old_versions_go_with_their_manifests_unless_a_snapshot_pins_them(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    snapshot, _ = take_snapshot(folder)
    before = set(folder.list(""))
    old = open_cache(folder.url).info.products["tokens/dct"]
    register_products(folder, {"tokens/dct": ProductInfo(fingerprint="f" * 64, tokenizer=old.tokenizer)})
    assert find_garbage(folder, 0) == []
    assert find_garbage(folder, 0, old_versions=True) == []
    folder.remove(snapshot.name)
    assert found_in(find_garbage(folder, 0)) == {"snapshot": [snapshot.manifests]}
    garbage = find_garbage(folder, 0, old_versions=True)
    of_dct = {name for name in before if "/dct/" in name}
    assert {one.file.name for one in garbage} == of_dct - set(folder.list("products")) | {snapshot.manifests}
    kinds = [one.kind for one in garbage]
    assert kinds == sorted(kinds, key=lambda kind: kind != "old manifest")
    assert list(remove_garbage(folder, garbage, 0)) == garbage
    assert find_garbage(folder, 0, old_versions=True) == []
    assert len(open_cache(folder.url).read("fake", open_cache(folder.url).clips()["clip_id"].to_pylist())) > 10


def test_a_version_that_is_the_current_one_again_stays(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    old = open_cache(folder.url).info.products["tokens/dct"]
    register_products(folder, {"tokens/dct": ProductInfo(fingerprint="f" * 64, tokenizer=old.tokenizer)})
    garbage = find_garbage(folder, 0, old_versions=True)
    assert garbage
    register_products(folder, {"tokens/dct": old})
    assert list(remove_garbage(folder, garbage, 0)) == []


def test_all_but_the_newest_packed_file_and_lost_plans_are_garbage(tmp_path: Path) -> None:
    make_cache(str(tmp_path / "cache"))
    folder = Folder(str(tmp_path / "cache"))
    compact_manifests(folder, at_least=1)
    (packed,) = (tmp_path / "cache" / "manifests").glob("packed-*")
    older = packed.with_name("packed-000000000000.parquet")
    older.write_bytes(b"older")
    os.utime(older, (1, 1))
    assert write_plan(folder, make_plan(recipe(), MANY[:3])) is None
    found = found_in(find_garbage(folder, 0))
    assert found["packed"] == ["manifests/packed-000000000000.parquet"]
    assert [name.partition("-")[0] for name in found["plan"]] == ["plan/clips", "plan/videos"]


def test_empty_folders_of_killed_workers_go_with_the_garbage(tmp_path: Path) -> None:
    make_cache(str(tmp_path))
    folder, staging = Folder(str(tmp_path)), tmp_path / ".staging"
    for name in ("host-17-0a1b2c3d", "host-18-0a1b2c3d"):
        (staging / name).mkdir(parents=True)
    os.utime(staging / "host-17-0a1b2c3d", (0, 0))
    assert list(remove_garbage(folder, [], 3600)) == []
    assert [place.name for place in staging.iterdir()] == ["host-18-0a1b2c3d"]
    assert list(remove_garbage(folder, [], 0)) == []
    assert not staging.exists()
