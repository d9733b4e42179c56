"""The gc command: what it lists, and what it removes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Command

WriteRecipe = Callable[..., str]


@pytest.fixture
def cache(tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path) -> Path:
    """A cache with an orphan of two days and one of this moment."""
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"])).code == 0
    for name, age_s in (("old", 2 * 86400), ("new", 0)):
        path = tmp_path / "cache" / "clips" / f"{name}-0123456789ab.parquet"
        path.write_bytes(b"1234567")
        os.utime(path, (time.time() - age_s,) * 2)
    return tmp_path / "cache"


def test_garbage_is_listed_and_removed_on_request_only(tokenmill: Command, cache: Path) -> None:
    listed = tokenmill("gc", "cache")
    assert (listed.code, "data: clips/old-0123456789ab.parquet" in listed.out) == (0, True)
    assert "new-0123456789ab" not in listed.out
    assert "nothing was removed: --delete does" in listed.out
    assert (cache / "clips" / "old-0123456789ab.parquet").exists()
    assert "removed 1 files, 7 bytes" in tokenmill("gc", "cache", "--delete").out
    assert not (cache / "clips" / "old-0123456789ab.parquet").exists()
    assert "no garbage older than 24h" in tokenmill("gc", "cache").out
    assert "removed 1 files, 7 bytes" in tokenmill("gc", "cache", "--delete", "--older-than", "0s").out
    assert tokenmill("verify", "cache", "--deep").code == 0


def test_a_damaged_manifest_stops_gc_before_it_removes_anything(tokenmill: Command, cache: Path) -> None:
    next((cache / "manifests" / "clips").iterdir()).write_bytes(b"{")
    done = tokenmill("gc", "cache", "--delete")
    assert done.code == 1
    assert "nothing was removed, since what is needed is not known: " in done.err
    assert (cache / "clips" / "old-0123456789ab.parquet").exists()


def test_old_versions_are_removed_on_request_only(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, cache: Path
) -> None:
    changed = {"fake": {"tokenizer": "fake", "batch_size": 2}}
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], tokens=changed)).code == 0
    before = len(list((cache / "tokens" / "fake").iterdir()))
    assert "old manifest" not in tokenmill("gc", "cache", "--older-than", "0s").out
    done = tokenmill("gc", "cache", "--older-than", "0s", "--old-versions", "--delete")
    assert (done.code, "old manifest: manifests/tokens/fake/" in done.out) == (0, True)
    assert len(list((cache / "tokens" / "fake").iterdir())) == before // 2
    assert tokenmill("verify", "cache", "--deep").code == 0


@pytest.mark.parametrize("age", ["24", "h", "-1h", "one day", "1w"])
def test_an_age_that_cannot_be_read_is_refused(tokenmill: Command, cache: Path, age: str) -> None:
    done = tokenmill("gc", "cache", f"--older-than={age}")
    assert (done.code, f"--older-than '{age}': accepted is a number with s, m, h or d" in done.err) == (1, True)
