"""Loaders of caches in object stores: parts of files through a bounded local cache that processes share."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.dataset import TokenDataset
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.pipeline.local_cache import LocalCache
from tokenmill.pipeline.retried_s3 import RetriedS3
from tokenmill.pipeline.retries import RetryPolicy
from tokenmill.schemas.errors import CacheError, StorageError

from ..faults.proxy import FaultProxy
from .loader_kit import CLIPS, GROUP_BYTES, assert_right, flat, ids_of, make_cache

NAMES = ["tracks", "short", "long"]
LIMIT = 8 * GROUP_BYTES  # far less than the tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("remote") / "cache"), names=NAMES)


def uploaded(made: str, url: str) -> str:
    filesystem, path = fsspec.core.url_to_fs(url)
    for file in Path(made).rglob("*"):
        if file.is_file() and not file.name.endswith(".duckdb"):
            filesystem.pipe_file(f"{path}/{file.relative_to(made)}", file.read_bytes())
    return url


@pytest.fixture(params=["memory", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.slow])])
def remote(request: pytest.FixtureRequest, made: str) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    return uploaded(
        made, f"memory:///{os.urandom(4).hex()}" if request.param == "memory" else request.getfixturevalue("s3_url")
    )


def small(folder: Path) -> LocalCache:
    return LocalCache(str(folder), LIMIT)


@pytest.mark.parametrize("shuffle", ["none", "global"])
def test_a_remote_cache_gives_what_a_local_one_gives(made: str, remote: str, tmp_path: Path, shuffle: Any) -> None:
    local, cache = open_cache(made), open_cache(remote)
    parts = small(tmp_path)
    loader = TokenLoader(cache, NAMES, 100, seed=2, shuffle=shuffle, local=parts)
    wanted = TokenLoader(local, NAMES, 100, seed=2, shuffle=shuffle)
    assert loader.state_dict() == wanted.state_dict()
    for batch, ids in zip(loader, ids_of(wanted), strict=True):
        assert batch["clip_id"] == ids
        assert_right(local, batch)
        assert parts.size_bytes() <= LIMIT
    dataset = TokenDataset(cache, "short", local=parts)
    assert dataset[11]["clip_id"] == TokenDataset(local, "short")[11]["clip_id"]
    assert (dataset[11]["short"] == TokenDataset(local, "short")[11]["short"]).all()


def test_what_was_fetched_is_not_fetched_again_and_can_be_deleted(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, parts = open_cache(remote), LocalCache(str(tmp_path / "parts"))
    first = ids_of(TokenLoader(cache, NAMES, 100, local=parts))
    with monkeypatch.context() as patch:
        patch.setattr("tokenmill.pipeline.mapped_tokens.read_ranges", None)
        assert ids_of(TokenLoader(cache, NAMES, 100, local=parts)) == first  # all of it from the local cache
    shutil.rmtree(tmp_path / "parts")
    assert ids_of(TokenLoader(cache, NAMES, 100, local=parts)) == first
    part = next(path for path in (tmp_path / "parts").iterdir() if path.suffix == ".part" and path.stat().st_size > 9)
    part.write_bytes(bytes(part.stat().st_size))  # damaged on the disk: fetched anew
    assert ids_of(TokenLoader(cache, NAMES, 100, local=parts)) == first


def test_damage_in_the_store_is_found_and_named(remote: str, tmp_path: Path) -> None:
    cache = open_cache(remote)
    name = cache.sql("select name from files where product = 'tokens/short' order by name")["name"][0].as_py()
    data = bytearray(cache.folder.read(name))
    group = cache.sql("from row_groups where name = ? and row_group = 1", [name]).to_pylist()[0]
    for place in (group["offset"] + 3, len(data) - 20):
        data[place] ^= 1
        cache.folder.fs.pipe_file(cache.folder.path(name), bytes(data))
        with pytest.raises(CacheError, match=f"{name}: .*damaged.*verify CACHE --deep --repair"):
            list(TokenLoader(cache, "short", 100, local=LocalCache(str(tmp_path / str(place)))))
        data[place] ^= 1
    cache.folder.fs.pipe_file(cache.folder.path(name), bytes(data[:-100]))
    with pytest.raises(CacheError, match=f"{name}: .*damaged"):
        list(TokenLoader(cache, "short", 100, local=LocalCache(str(tmp_path / "short"))))


READER = """
import sys
from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.pipeline.local_cache import LocalCache
url, folder, limit, seed = sys.argv[1:]
loader = TokenLoader(open_cache(url), ["short", "tracks"], 60, seed=int(seed), local=LocalCache(folder, int(limit)))
for _ in range(2):
    for batch in loader:
        print(*batch["clip_id"], int(batch["short"].long().sum()), int(batch["tracks"].values.float().sum() * 1000))
"""


@pytest.mark.s3
def test_processes_share_a_local_cache_that_is_smaller_than_the_data(
    made: str, s3_server: str, s3_url: str, tmp_path: Path
) -> None:
    uploaded(made, s3_url)
    commands = [[sys.executable, "-c", READER, s3_url, str(tmp_path / "parts"), str(LIMIT), seed] for seed in "12"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    largest, over = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not over.wait(0.002):
            largest = max(largest, bytes_in(tmp_path / "parts"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = [reader.communicate()[0] for reader in readers]
    over.set()
    watcher.join()
    assert [reader.returncode for reader in readers] == [0, 0]
    assert 0 < largest <= LIMIT
    for seed, lines in zip((1, 2), said, strict=True):
        wanted = TokenLoader(open_cache(made), ["short", "tracks"], 60, seed=seed)
        expected = [
            f"{' '.join(batch['clip_id'])} {int(batch['short'].long().sum())}"
            f" {int(batch['tracks'].values.float().sum() * 1000)}"
            for _ in range(2)
            for batch in wanted
        ]
        assert lines.splitlines() == expected


def bytes_in(folder: Path) -> int:
    """What lies there at one moment: whoever makes or removes a file holds this lock."""
    try:
        with open(folder / "total", "rb") as total:
            fcntl.flock(total, fcntl.LOCK_EX)
            return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return 0


@pytest.mark.s3
def test_forked_workers_read_a_store(made: str, s3_server: str, s3_url: str, tmp_path: Path) -> None:
    cache: TokenCache = open_cache(uploaded(made, s3_url))
    loader = TokenLoader(cache, "short", 100, local=LocalCache(str(tmp_path)))
    wanted = ids_of(loader)
    loader.set_epoch(0)
    shutil.rmtree(tmp_path)
    workers = DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert ids_of(workers) == wanted


@pytest.mark.s3
@pytest.mark.parametrize(
    "harm",
    ["cut_download", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("status", "refuse", "lose_answer"))],
)
def test_a_store_that_fails_gives_right_clips_or_a_clear_error(
    made: str, fault_proxy: FaultProxy, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(RetriedS3, "policy", RetryPolicy(attempts=4, first_wait_s=0.01))
    fault_proxy.clear()
    cache, local = open_cache(uploaded(made, s3_url)), open_cache(made)
    cache.sql("select 1 as x")
    fault_proxy.inject(harm, method="GET", probability=0.1)
    ids = []
    for batch in TokenLoader(cache, ["short", "tracks"], 100, local=LocalCache(str(tmp_path / "now_and_then"))):
        assert_right(local, batch)
        ids += batch["clip_id"]
    assert len(set(ids)) == CLIPS
    assert fault_proxy.harmed[harm] > 0
    fault_proxy.clear()
    loader = TokenLoader(cache, ["short", "tracks"], 100, local=LocalCache(str(tmp_path / "always")))
    fault_proxy.inject(harm, method="GET", target="/tokens/short/")
    start_s = time.monotonic()
    with pytest.raises((StorageError, CacheError), match=r"gave up after|damaged"):
        list(loader)
    assert time.monotonic() - start_s < 60
    fault_proxy.clear()
    assert sorted(flat(ids_of(loader))) == sorted(ids)  # and goes on once the store is back


def test_a_limit_below_one_row_group_is_refused(remote: str, tmp_path: Path) -> None:
    loader = TokenLoader(open_cache(remote), "short", 100, local=LocalCache(str(tmp_path), 1000))
    with pytest.raises(CacheError, match=r"bytes, and the local cache .* may hold 1000"):
        list(loader)
