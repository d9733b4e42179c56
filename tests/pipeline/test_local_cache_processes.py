"""The local cache between processes: they wait for each other, keep one limit, and may be killed at any moment."""

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenmill.pipeline.local_cache import TOTAL, LocalCache

from .test_local_cache import PART, bytes_of, holds, never, read, room_for

PATIENCE_S = 30
KEYS = [f"k{i}" for i in range(20)]


@contextlib.contextmanager
def running(target: Callable[..., None], cache: LocalCache, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that calls one of the functions of this file."""
    values = (cache.folder, cache.limit_bytes, *arguments)
    command = [sys.executable, "-m", __name__, target.__name__, *map(str, values)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "parts"


def count_fetches(cache: LocalCache, marks: str) -> None:
    """Read all keys, leaving a file for each fetch."""
    folder = Path(marks)
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.001)
    for key in KEYS:

        def fetch(key: str = key) -> bytes:
            (folder / f"fetched-{key}-{os.getpid()}").touch()
            time.sleep(0.02)
            return bytes_of(key)

        assert read(cache, key, fetch) == bytes_of(key)


def test_two_processes_that_want_the_same_fetch_it_once(folder: Path, tmp_path: Path) -> None:
    cache = LocalCache(str(folder))
    with running(count_fetches, cache, tmp_path) as one, running(count_fetches, cache, tmp_path) as other:
        assert [process.wait(PATIENCE_S) for process in (one, other)] == [0, 0]
    fetched = [path.name.split("-")[1] for path in tmp_path.glob("fetched-*")]
    assert sorted(fetched) == sorted(KEYS)


def write_at_random(cache: LocalCache, seed: str) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        number = rng.randrange(60)
        key, size = f"key {number}", 200 + 40 * number
        assert read(cache, key, size=size) == bytes_of(key, size)
        if rng.random() < 0.05:
            cache.discard(key)


def bytes_in(folder: Path) -> int:
    """All that lies in the folder while nobody can change it."""
    with open(folder / TOTAL, "rb") as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.iterdir())


def test_the_limit_is_kept_at_every_moment_by_processes_that_write_at_random(folder: Path) -> None:
    cache = LocalCache(str(folder), 12_000)
    read(cache, "first")
    seen = []
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(running(write_at_random, cache, seed)) for seed in range(3)]
        while any(job.poll() is None for job in jobs):
            seen.append(bytes_in(folder))
            time.sleep(0.0005)
        assert [job.returncode for job in jobs] == [0, 0, 0]
    assert max(seen) <= cache.limit_bytes
    assert max(seen) > 0.8 * cache.limit_bytes
    assert not list(folder.glob("*.tmp"))
    assert bytes_in(folder) == cache.size_bytes() == int.from_bytes((folder / TOTAL).read_bytes(), "little")


def hang_in_the_middle(cache: LocalCache, mark: str) -> None:
    """Write half of a part and stay there."""
    plain = os.write

    def half(descriptor: int, data: memoryview) -> int:
        plain(descriptor, data[: len(data) // 2])
        Path(mark).touch()
        time.sleep(PATIENCE_S)
        return len(data)

    os.write = half
    read(cache, "a")


def test_what_a_killed_process_was_writing_is_no_part_and_makes_room(folder: Path, tmp_path: Path) -> None:
    cache = LocalCache(str(folder), room_for(2))
    with running(hang_in_the_middle, cache, tmp_path / "mark") as process:
        wait_for(tmp_path / "mark")
        assert not holds(cache, "a")
        assert cache.size_bytes() == room_for(1)  # what it will write is counted already
        for key in "bcd":
            read(cache, key)
        assert len(list(folder.glob("*.tmp"))) == 1  # its writer lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert read(cache, "a") == bytes_of("a")
    assert not list(folder.glob("*.tmp"))
    assert cache.size_bytes() <= cache.limit_bytes


def test_who_finds_the_limit_filled_by_others_waits_for_them(folder: Path, tmp_path: Path) -> None:
    cache = LocalCache(str(folder), room_for(1))
    with running(hang_in_the_middle, cache, tmp_path / "mark") as process:
        wait_for(tmp_path / "mark")
        killer = threading.Timer(0.1, process.kill)
        killer.start()
        assert read(cache, "b") == bytes_of("b")
        killer.join()
    assert cache.size_bytes() == room_for(1)


def fetch_for_ever(cache: LocalCache, mark: str) -> None:
    """Hold the lock of a key, and leave a forked process that outlives this one."""

    def fetch() -> bytes:
        if (child := os.fork()) == 0:
            time.sleep(PATIENCE_S)
            Path(f"{mark}.ended").touch()
            os._exit(0)
        Path(f"{mark}.new").write_text(str(child))
        os.rename(f"{mark}.new", mark)
        time.sleep(PATIENCE_S)
        return b""

    cache.open("a", PART, fetch)


def test_the_lock_of_a_killed_process_ends_with_it(folder: Path, tmp_path: Path) -> None:
    cache = LocalCache(str(folder))
    with running(fetch_for_ever, cache, tmp_path / "mark"):
        wait_for(tmp_path / "mark")
    child = int((tmp_path / "mark").read_text())
    try:
        assert read(cache, "a") == bytes_of("a")
        assert not (tmp_path / "mark.ended").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_fork_reads_on(folder: Path) -> None:
    cache = LocalCache(str(folder))
    read(cache, "a")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            read(cache, "a", never)
            read(cache, "b")
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert read(cache, "b", never) == bytes_of("b")


if __name__ == "__main__":  # what `running` starts
    name, folder_of, limit, *rest = sys.argv[1:]
    globals()[name](LocalCache(folder_of, int(limit)), *rest)
