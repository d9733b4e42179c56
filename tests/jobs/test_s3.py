"""The same job on an object store: sources and cache by s3:// URLs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from ..conftest import BUCKET
from .conftest import Command


@pytest.mark.s3
def test_a_job_on_s3_makes_the_files_that_it_makes_locally(
    tokenmill: Command,
    write_recipe: Callable[..., str],
    footage: Path,
    tmp_path: Path,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    s3 = fsspec.filesystem("s3")
    s3.put_file(str(footage / "carphone_pristine.mp4"), f"{BUCKET}/job/videos/carphone.mp4")
    s3.pipe_file(f"{BUCKET}/job/videos/broken.mp4", b"no video")
    local = write_recipe([footage / "carphone_pristine.mp4"])
    assert tokenmill("run", local).code == 0
    remote = ["--set", f"cache=s3://{BUCKET}/job/cache", "--set", f"sources.0=s3://{BUCKET}/job/videos"]
    done = tokenmill("run", local, *remote)
    assert done.code == 3, done.err
    made_here = {
        str(path.relative_to(tmp_path / "cache")): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("clips", "tokens")
        for path in (tmp_path / "cache" / folder).rglob("*.parquet")
    }
    prefix = f"{BUCKET}/job/cache/"
    made_there = {
        name.removeprefix(prefix): hashlib.sha256(s3.cat_file(name)).hexdigest()
        for folder in ("clips", "tokens")
        for name in s3.find(f"{prefix}{folder}")
    }
    assert made_there == made_here
    cache = f"s3://{BUCKET}/job/cache"
    again = tokenmill("run", local, *remote)
    assert "clips=0 shards=0" in again.err
    answer = tokenmill("sql", cache, "select sum(uses) as n from code_usage('fake')", "--format", "csv")
    assert answer.out == f"n\n{15 * 2 * 4 * 6}\n"
    assert tokenmill("verify", cache).code == 0
    assert not (tmp_path / "s3:").exists()
