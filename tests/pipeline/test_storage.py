"""Folders: files appear whole or not at all, once."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tokenmill.pipeline.storage import Folder, storage_errors
from tokenmill.schemas.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        yield Folder(str(tmp_path / "cache"))
    else:
        yield Folder("memory://storage-test")
        fsspec.filesystem("memory").store.clear()


def test_create_makes_a_file_once(folder: Folder) -> None:
    assert folder.create("manifests/a.json", b"1")
    assert not folder.create("manifests/a.json", b"2")
    assert folder.read("manifests/a.json") == b"1"


def test_of_many_racing_writers_one_wins(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: folder.create("m.json", str(i).encode()), range(16)))
    assert won.count(True) == 1
    assert folder.read("m.json") == str(won.index(True)).encode()
    assert folder.list("") == ["m.json"]


def test_replace_writes_over(folder: Folder) -> None:
    folder.replace("cache.json", b"1")
    folder.replace("cache.json", b"2")
    assert folder.read("cache.json") == b"2"


def test_published_files_are_named_by_content_and_left_alone(folder: Folder, tmp_path: Path) -> None:
    for _ in range(2):
        with folder.staging() as staging:
            path = Path(staging) / "a.parquet"
            path.write_bytes(b"tokens")
            entry = folder.publish(str(path), "tokens/dct/s1", 3)
    assert folder.list("") == [entry.name]
    assert entry.name == f"tokens/dct/s1-{entry.sha256[:12]}.parquet"
    assert (entry.size_bytes, entry.num_rows) == (6, 3)
    assert folder.read(entry.name) == b"tokens"


def test_listing_an_absent_folder_is_empty(folder: Folder) -> None:
    assert folder.list("manifests") == []
    assert not folder.exists("cache.json")


def test_an_absent_file_is_an_error_with_its_place(folder: Folder) -> None:
    with pytest.raises(StorageError, match=r"cache\.json: no such file: check the path"):
        folder.read("cache.json")


def test_a_full_disk_is_said_with_a_remedy() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(StorageError, match="/x: the disk is full: free some space and run again"),
        storage_errors("/x"),
        full.open("wb", buffering=0) as stream,
    ):
        stream.write(b"x" * 4096)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "read-only: choose another place"),
        (errno.EACCES, "permission denied: choose another place"),
        (errno.EDQUOT, "quota is used up"),
    ],
)
def test_every_kind_of_refusal_has_a_remedy(number: int, message: str) -> None:
    with pytest.raises(StorageError, match=message), storage_errors("/x"):
        raise OSError(number, os.strerror(number))


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="it is a file, a folder is wanted: choose another place"):
        Folder(str(tmp_path / "cache"))
    with pytest.raises(StorageError, match="a part of the path is a file, not a folder"):
        Folder(str(tmp_path / "cache" / "inner")).create("cache.json", b"")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageError, match=r"foo://x: .*[Pp]rotocol"):
        Folder("foo://x")
