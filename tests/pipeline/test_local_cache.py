"""The local cache: bytes come back as they were fetched, the limit holds at every moment, no process can harm it."""

import errno
import os
import pickle
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.pipeline import local_cache
from tokenmill.pipeline.local_cache import TOTAL, TOTAL_BYTES, LocalCache
from tokenmill.schemas.errors import CacheError, StorageError

PART = 1000
PATIENCE_S = 30


def bytes_of(key: str, size: int = PART) -> bytes:
    return random.Random(key).randbytes(size)


def never() -> bytes:
    raise AssertionError("it was fetched again")


def read(cache: LocalCache, key: str, fetch: Callable[[], bytes] | None = None, size: int = PART) -> bytes:
    descriptor = cache.open(key, size, fetch or (lambda: bytes_of(key, size)))
    try:
        return os.pread(descriptor, size + 1, 0)
    finally:
        os.close(descriptor)


def holds(cache: LocalCache, key: str) -> bool:
    """Whether `key` is there, without marking it as used."""
    return os.path.exists(cache._path(key))


def room_for(parts: int) -> int:
    """A limit that lets as many parts be."""
    return parts * PART + TOTAL_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "parts"


def test_bytes_are_fetched_once_and_then_read_from_the_disk(folder: Path) -> None:
    cache = LocalCache(str(folder))
    assert (cache.size_bytes(), folder.exists()) == (0, False)
    assert read(cache, "s3://bucket/a#3") == bytes_of("s3://bucket/a#3")
    again = pickle.loads(pickle.dumps(cache))
    assert read(again, "s3://bucket/a#3", never) == bytes_of("s3://bucket/a#3")
    assert again.size_bytes() == PART + TOTAL_BYTES
    assert read(cache, "nothing", size=0) == b""


def test_the_usual_folder_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert LocalCache().folder == str(tmp_path / "xdg" / "tokenmill" / "parts")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LocalCache().folder == str(tmp_path / ".cache" / "tokenmill" / "parts")


def test_descriptors_cannot_write(folder: Path) -> None:
    cache = LocalCache(str(folder))
    for _ in range(2):
        descriptor = cache.open("a", PART, lambda: bytes_of("a"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
        os.close(descriptor)


def test_what_was_asked_for_longest_ago_makes_room(folder: Path) -> None:
    cache = LocalCache(str(folder), room_for(10))
    for key in "abcdefghij":
        read(cache, key)
    read(cache, "a", never)
    read(cache, "k")  # down to nine tenths of the limit, with this one's bytes on top
    assert [key for key in "abcdefghijk" if not holds(cache, key)] == ["b", "c"]
    assert cache.size_bytes() == room_for(9)
    read(cache, "l")
    assert cache.size_bytes() == room_for(10)
    assert read(cache, "b") == bytes_of("b")


def test_an_open_descriptor_outlives_eviction_and_discarding(folder: Path) -> None:
    cache = LocalCache(str(folder), room_for(1))
    descriptor = cache.open("a", PART, lambda: bytes_of("a"))
    other = cache.open("b", PART, lambda: bytes_of("b"))
    assert not holds(cache, "a")
    cache.discard("b")
    assert [os.pread(one, PART, 0) for one in (descriptor, other)] == [bytes_of("a"), bytes_of("b")]
    os.close(descriptor)
    os.close(other)


def test_discarded_and_torn_bytes_are_fetched_again(folder: Path) -> None:
    cache = LocalCache(str(folder), room_for(2))
    read(cache, "a", lambda: bytes(PART))
    cache.discard("a")
    cache.discard("never there")
    assert cache.size_bytes() == TOTAL_BYTES
    assert read(cache, "a") == bytes_of("a")
    os.truncate(cache._path("a"), PART - 1)
    assert read(cache, "a") == bytes_of("a")
    assert cache.size_bytes() == room_for(1)


def test_errors_of_fetching_pass_through_and_leave_nothing(folder: Path) -> None:
    cache = LocalCache(str(folder))

    def broken() -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="reset"):
            cache.open("a", PART, broken)
    with pytest.raises(ValueError, match="a: 3 bytes were fetched, 1000 asked for"):
        cache.open("a", PART, lambda: b"abc")
    assert cache.size_bytes() == TOTAL_BYTES
    assert read(cache, "a") == bytes_of("a")


def test_a_part_larger_than_the_limit_is_refused_before_it_is_fetched(folder: Path) -> None:
    cache = LocalCache(str(folder), PART)
    with pytest.raises(CacheError, match=r"a: 1000 bytes, and the local cache .* may hold 1000, 8 of them .* larger"):
        cache.open("a", PART, never)
    assert read(LocalCache(str(folder), room_for(1)), "a") == bytes_of("a")


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    folder.write_bytes(b"a file")
    with pytest.raises(StorageError, match=r"parts.*: a part of the path is a file"):
        read(LocalCache(str(folder)), "a")
    if os.geteuid() != 0:
        (folder.parent / "locked").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="permission denied: choose another place"):
            read(LocalCache(str(folder.parent / "locked")), "a")


def test_a_disk_that_takes_no_more_is_an_error_that_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, plain = LocalCache(str(folder), room_for(2)), os.ftruncate
    read(cache, "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let a file grow: when its size is set, or else in the middle of its bytes.
    for sized in (plain, lambda descriptor, size: None):
        monkeypatch.setattr(os, "ftruncate", sized)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PART // 2, before[1]))
        try:
            with pytest.raises(StorageError, match=r"parts: .*File too large"):
                read(cache, "b")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.size_bytes() == room_for(1)
    assert read(cache, "a", never) == bytes_of("a")


def test_a_full_disk_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.write

    def full(descriptor: int, data: memoryview) -> int:
        plain(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = LocalCache(str(folder))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="parts: the disk is full: free some space"):
        read(cache, "a")
    monkeypatch.undo()
    assert cache.size_bytes() == TOTAL_BYTES
    assert read(cache, "a") == bytes_of("a")


def test_a_folder_deleted_at_any_time_is_made_again(folder: Path) -> None:
    cache = LocalCache(str(folder), room_for(3))
    descriptor = cache.open("a", PART, lambda: bytes_of("a"))
    shutil.rmtree(folder)
    assert os.pread(descriptor, PART, 0) == bytes_of("a")
    os.close(descriptor)

    def deleting() -> bytes:
        shutil.rmtree(folder)
        return bytes_of("b")

    assert read(cache, "a") == bytes_of("a")
    assert read(cache, "b", deleting) == bytes_of("b")
    assert read(cache, "b", never) == bytes_of("b")
    assert cache.size_bytes() == room_for(1)


def test_a_folder_deleted_again_and_again_while_in_use_loses_nothing(folder: Path) -> None:
    cache, stop = LocalCache(str(folder), room_for(4)), threading.Event()

    def delete() -> None:
        while not stop.is_set():
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.002)

    deleter = threading.Thread(target=delete)
    deleter.start()
    try:
        for i in range(300):
            assert read(cache, f"key {i % 6}") == bytes_of(f"key {i % 6}")
    finally:
        stop.set()
        deleter.join()


@pytest.mark.parametrize("stored", [b"", b"torn", (0).to_bytes(8, "little"), (10**9).to_bytes(8, "little")])
def test_a_total_that_is_lost_or_wrong_or_older_than_the_machine_is_counted_anew(folder: Path, stored: bytes) -> None:
    cache = LocalCache(str(folder), room_for(4))
    for key in "abcd":
        read(cache, key)
    (folder / TOTAL).write_bytes(stored)
    os.utime(folder / TOTAL, (0, 0))
    read(cache, "e")
    assert cache.size_bytes() <= room_for(4)
    assert holds(cache, "d")


def test_files_of_others_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_bytes(bytes(10 * PART))
    cache = LocalCache(str(folder), room_for(2))
    for key in "abcdef":
        read(cache, key)
    assert (folder / "notes.txt").stat().st_size == 10 * PART
    assert cache.size_bytes() <= room_for(2)


def test_a_part_is_on_the_disk_before_it_gets_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, synced = LocalCache(str(folder)), []

    def sync(descriptor: int) -> None:
        synced.append((os.pread(descriptor, PART, 0), holds(cache, "a")))

    monkeypatch.setattr(os, "fsync", sync)
    read(cache, "a")
    assert synced == [(bytes_of("a"), False)]


def test_two_threads_that_want_the_same_fetch_it_once(folder: Path) -> None:
    cache, fetched = LocalCache(str(folder)), []
    together = threading.Barrier(4)

    def fetch() -> bytes:
        fetched.append(threading.get_ident())
        time.sleep(0.05)
        return bytes_of("a")

    def ask() -> None:
        together.wait(PATIENCE_S)
        read(cache, "a", fetch)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_locks_are_few_and_no_descriptor_stays_open(folder: Path) -> None:
    cache = LocalCache(str(folder), room_for(3))
    read(cache, "a")
    before = len(os.listdir("/dev/fd"))
    for i in range(30):
        read(cache, f"key {i}")
    assert len(os.listdir("/dev/fd")) == before
    assert local_cache._held == set()
    assert all(len(path.name) == len("lock-") + local_cache.LOCK_DIGITS for path in folder.glob("lock-*"))
