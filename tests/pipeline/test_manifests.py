"""Manifests: what is committed is read whole, from packed files where they help and without them where they do not."""

import hashlib
import os
from pathlib import Path

import fsspec
import pytest

from tokenmill.pipeline.manifests import (
    READ_THREADS,
    committed_names,
    compact_manifests,
    is_manifest,
    read_all,
    read_manifests,
    read_named,
)
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import CacheError, StorageError
from tokenmill.schemas.shard import ShardManifest

from ..conftest import Store
from ..faults.proxy import FaultProxy

VERSION, OLD = "ab" * 32, "cd" * 32


def manifest(number: int, fingerprint: str = VERSION, host: str = "here") -> ShardManifest:
    return ShardManifest(
        shard_id=hashlib.sha256(b"%d" % number).hexdigest()[:16],
        product="tokens/dct",
        fingerprint=fingerprint,
        files=(),
        failures=(),
        clips_per_video={"video": number},
        host=host,
        timings_s={"decode": 0.5},
    )


def commit(folder: Folder, *manifests: ShardManifest) -> None:
    for one in manifests:
        assert folder.create(one.name, one.to_json())


def by_name(manifests: list[ShardManifest]) -> list[ShardManifest]:
    return sorted(manifests, key=lambda one: one.name)


def packed_files(folder: Folder) -> list[str]:
    return [name for name in folder.list("manifests") if not is_manifest(name)]


@pytest.fixture
def folder(store: Store) -> Folder:
    return Folder(store.url)


def test_manifests_are_read_alike_singly_and_packed_and_in_part_packed(folder: Folder) -> None:
    made = [manifest(number) for number in range(12)]
    old = [manifest(number, OLD) for number in range(3)]
    commit(folder, *made[:9], *old)
    fingerprints = {"tokens/dct": VERSION, "clips": OLD}
    assert read_manifests(folder, fingerprints) == by_name(made[:9])
    assert compact_manifests(folder, at_least=12) == 12
    (packed,) = packed_files(folder)
    assert packed.startswith("manifests/packed-")
    assert packed.endswith(".parquet")
    commit(folder, *made[9:])
    assert read_manifests(folder, fingerprints) == by_name(made)
    assert read_all(folder) == by_name([*made, *old])
    assert committed_names(folder) == {one.name for one in [*made, *old]}


def test_packing_waits_until_enough_are_new_and_replaces_what_it_supersedes(folder: Folder) -> None:
    commit(folder, *map(manifest, range(4)))
    assert compact_manifests(folder, at_least=5) == 0
    assert packed_files(folder) == []
    assert compact_manifests(folder, at_least=4) == 4
    (first,) = packed_files(folder)
    commit(folder, *map(manifest, range(4, 7)))
    assert compact_manifests(folder, at_least=4) == 0
    assert compact_manifests(folder, at_least=3) == 3
    (second,) = packed_files(folder)
    assert second != first
    assert compact_manifests(folder, at_least=0) == 0
    assert packed_files(folder) == [second]
    assert read_all(folder) == by_name([manifest(number) for number in range(7)])


def test_an_empty_cache_has_nothing_to_read_or_pack(folder: Folder) -> None:
    assert committed_names(folder) == frozenset()
    assert read_all(folder) == read_manifests(folder, {"clips": VERSION}) == read_named(folder, []) == []
    assert compact_manifests(folder) == 0


def test_named_manifests_come_in_the_order_of_their_names(folder: Folder) -> None:
    made = [manifest(number) for number in range(READ_THREADS + 1)]  # fewer are not looked for in packed files
    commit(folder, *made)
    compact_manifests(folder, at_least=1)
    for wanted in (made[::-1], made[7:2:-1]):
        assert read_named(folder, [one.name for one in wanted]) == wanted
    with pytest.raises(StorageError, match=r"manifests/tokens/dct/.*\.json: no such file"):
        read_named(folder, [made[0].name, manifest(99).name])
    with pytest.raises(StorageError, match=r"manifests/tokens/dct/.*\.json: no such file"):
        read_named(folder, [one.name for one in [*made, manifest(99)]])


@pytest.mark.parametrize("damage", ["empty", "flipped", "no table"])
def test_a_damaged_packed_file_is_passed_over_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder, made = Folder(str(tmp_path)), [manifest(number) for number in range(3)]
    commit(folder, *made)
    compact_manifests(folder, at_least=1)
    (packed,) = packed_files(folder)
    if damage == "empty":
        folder.replace(packed, b"")
    elif damage == "flipped":
        data = folder.read(packed)
        folder.replace(packed, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    else:  # of the right name all the same
        folder.remove(packed)
        packed = f"manifests/packed-{hashlib.sha256(b'PAR1').hexdigest()[:12]}.parquet"
        folder.replace(packed, b"PAR1")
    assert read_all(folder) == by_name(made)
    assert f"event=packed_manifests_ignored file={tmp_path}/{packed}" in caplog.text
    assert compact_manifests(folder, at_least=1) == 3
    assert len(packed_files(folder)) == 1
    caplog.clear()
    assert read_all(folder) == by_name(made)
    assert caplog.text == ""


def test_a_manifest_made_again_under_its_name_is_read_anew(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    commit(folder, manifest(1), manifest(2))
    compact_manifests(folder, at_least=1)
    folder.remove(manifest(1).name)
    assert read_all(folder) == [manifest(2)]
    again = manifest(1, host="away")
    assert len(again.to_json()) == len(manifest(1).to_json())
    commit(folder, again)
    assert read_all(folder) == by_name([again, manifest(2)])
    assert compact_manifests(folder, at_least=1) == 1


def test_a_copied_cache_is_read_although_its_stamps_are_others(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "a"))
    commit(folder, manifest(1), manifest(2))
    compact_manifests(folder, at_least=1)
    fsspec.filesystem("file").copy(str(tmp_path / "a"), str(tmp_path / "b"), recursive=True)
    for path in (tmp_path / "b").rglob("*.json"):
        os.utime(path, (1, 1))
    assert read_all(Folder(str(tmp_path / "b"))) == by_name([manifest(1), manifest(2)])


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.replace(manifest(1).name, b"{")
    with pytest.raises(CacheError, match=rf"{manifest(1).name}: damaged manifest .*: delete it and run the recipe"):
        read_all(folder)


def test_packed_manifests_spare_requests(fault_proxy: FaultProxy, s3_url: str) -> None:
    folder, made = Folder(s3_url), [manifest(number) for number in range(20)]
    commit(folder, *made)
    compact_manifests(folder, at_least=20)
    fault_proxy.seen.clear()
    assert read_all(folder) == by_name(made)
    assert len(fault_proxy.seen) <= 3


def test_a_packed_file_that_is_listed_but_gone_costs_only_time(fault_proxy: FaultProxy, s3_url: str) -> None:
    folder, made = Folder(s3_url), [manifest(number) for number in range(5)]
    commit(folder, *made)
    compact_manifests(folder, at_least=5)
    fault_proxy.inject("stale_listing")
    (packed,) = packed_files(folder)
    folder.remove(packed)
    assert read_all(folder) == by_name(made)
