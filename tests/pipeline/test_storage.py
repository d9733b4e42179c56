"""Folders: files appear whole or not at all, once."""

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokenmill.pipeline.storage import Folder, storage_errors
from tokenmill.schemas.errors import StorageError

from ..conftest import Store


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


def test_files_are_found_with_their_sizes_and_times(store: Store) -> None:
    folder = Folder(store.url)
    assert folder.find("") == []
    folder.replace("tokens/b.bin", b"22")
    folder.replace("tokens/a/c.bin", b"333")
    folder.replace("tokens2/d.bin", b"")
    found = folder.find("tokens")
    assert [(file.name, file.size_bytes) for file in found] == [("tokens/a/c.bin", 3), ("tokens/b.bin", 2)]
    assert all(abs(file.modified_s - time.time()) < 60 for file in found)
    assert folder.list("tokens") == [file.name for file in found]


def test_a_removed_file_is_gone_and_may_be_removed_again(store: Store) -> None:
    folder = Folder(store.url)
    folder.replace("a/b.json", b"1")
    for _ in range(2):
        folder.remove("a/b.json")
        assert not folder.exists("a/b.json")
    assert folder.create("a/b.json", b"2")


def test_a_store_that_creates_once_says_so_and_keeps_no_trace_of_the_trial(store: Store) -> None:
    folder = Folder(store.url)
    assert folder.can_create()
    assert folder.list("") == []


def test_one_process_alone_may_create_without_help_of_the_store(store: Store) -> None:
    folder = Folder(store.url)
    assert folder.create_unguarded("m/a.json", b"1")
    assert not folder.create_unguarded("m/a.json", b"2")
    assert folder.read("m/a.json") == b"1"


@pytest.mark.s3
def test_what_was_found_once_is_not_remembered(s3_server: str, s3_url: str) -> None:
    folder, other = Folder(s3_url), fsspec.filesystem("s3")
    folder.replace("m/a.json", b"1")
    assert folder.list("m") == ["m/a.json"]
    other.pipe_file(folder.path("m/a.json"), b"22")
    assert [file.size_bytes for file in folder.find("m")] == [2]
    other.rm_file(folder.path("m/a.json"))
    assert not folder.exists("m/a.json")


@pytest.mark.s3
def test_marks_of_folders_are_no_files(s3_server: str, s3_url: str) -> None:
    folder = Folder(s3_url)
    fsspec.filesystem("s3").call_s3("put_object", Bucket=folder.root.partition("/")[0], Key=s3_url[5:] + "/m/")
    folder.replace("m/a.json", b"1")
    assert folder.list("m") == ["m/a.json"]


class LookingFileSystem(MemoryFileSystem):
    """A filesystem whose library looks before it writes, as most do: of two writers both may win."""

    protocol = "looking"
    store: dict = {}  # noqa: RUF012


def test_a_store_whose_library_looks_before_it_writes_cannot_create() -> None:
    fsspec.register_implementation("looking", LookingFileSystem, clobber=True)
    folder = Folder("looking://cache")
    assert not folder.can_create()
    assert folder.create_unguarded("m.json", b"1")
    assert folder.list("") == ["m.json"]


@pytest.fixture
def _no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_no_hard_links")
def test_without_hard_links_files_are_still_created_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert not folder.can_create()
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: folder.create("m.json", b"%d" % i), range(16)))
    assert won.count(True) == 1
    assert folder.read("m.json") == b"%d" % won.index(True)
    assert folder.list("") == ["m.json"]


def test_a_link_that_a_network_file_system_made_twice_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    folder = Folder(str(tmp_path))
    assert folder.create("m.json", b"1")
    assert not folder.create("m.json", b"2")
    assert folder.read("m.json") == b"1"


def test_files_on_another_disk_are_listed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.bin").write_bytes(b"1")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens").symlink_to(tmp_path / "disk")
    assert Folder(str(tmp_path / "cache")).list("tokens") == ["tokens/a.bin"]


def test_a_part_that_cannot_be_listed_is_an_error_not_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "tokens").symlink_to("tokens")  # a link to itself
    with pytest.raises(StorageError, match="/tokens: Too many levels of symbolic links"):
        Folder(str(tmp_path)).list("tokens")


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_is_said(s3_server: str) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/x/a\.json: The specified bucket does not exist"):
        Folder("s3://no-such-bucket/x").replace("a.json", b"1")


def test_staging_folders_come_and_go_side_by_side(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "cache"))

    def stage() -> bool:
        for _ in range(100):
            with folder.staging() as place:
                (Path(place) / "file").write_bytes(b"x")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: stage(), range(8)))
    assert not (tmp_path / "cache" / ".staging").exists()
