"""verify --repair: what is damaged comes back as it was, and nothing is deleted that cannot be made again."""

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pytest
import yaml

from tokenmill.jobs import repair
from tokenmill.jobs.main import main
from tokenmill.pipeline.index import ensure_index, open_index
from tokenmill.pipeline.snapshots import read_snapshot
from tokenmill.pipeline.storage import Folder, storage_errors
from tokenmill.tokenizers.base import FakeTokenizer

from .conftest import Command, Run

TOKENS = {"fake": {"tokenizer": "fake", "batch_size": 4}, "other": {"tokenizer": "fake", "batch_size": 2}}


def bytes_in(folder: Path) -> dict[str, bytes]:
    """What is committed: all but what is derived, or names a time."""
    names = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {
        name: b"" if name.startswith("manifests/") else path.read_bytes()
        for path, name in sorted(names.items())
        if not name.startswith(("index", ".")) and "packed" not in name
    }


def problems_in(done: Run) -> list[str]:
    return [line.removeprefix("problem: ") for line in done.out.splitlines() if line.startswith("problem: ")]


def spoil(path: Path) -> Path:
    """Change a byte of a file, not its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def file_of(cache: Path, product: str) -> Path:
    return min(path for path in (cache / product).iterdir() if path.is_file())


def write_recipe(folder: Path, tokens: dict[str, Any]) -> None:
    recipe = {
        "cache": str(folder / "cache"),
        "sources": [str(folder / "video.mp4")],
        "clips": {"num_frames": 8, "height": 32, "width": 48},
        "tokens": tokens,
        "shards": {"frames": 64, "format": "both"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def folder(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache: two shards of 15 clips, tokens of two tokenizers in Parquet and in tars, a snapshot."""
    folder = tmp_path_factory.mktemp("repair") / "now"
    folder.mkdir()
    shutil.copy(footage / "carphone_pristine.mp4", folder / "video.mp4")
    write_recipe(folder, TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (["run", "recipe.yaml"], ["snapshot", "cache"]):
            patch.setattr(sys, "argv", ["tokenmill", *command])
            with pytest.raises(SystemExit, match="0"):
                main()
    shutil.copytree(folder, folder.parent / "whole")
    return folder


@pytest.fixture
def cache(tokenmill: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as it was made; the commands run beside it."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "whole", folder)  # with the times of the files, which sources are known by
    monkeypatch.chdir(folder)
    return folder / "cache"


@pytest.fixture
def source(cache: Path) -> Path:
    return cache.parent / "video.mp4"


def test_damaged_files_of_every_product_come_back_as_they_were(tokenmill: Command, cache: Path) -> None:
    before = bytes_in(cache)
    torn = file_of(cache, "clips")
    torn.write_bytes(b"torn")
    (index, *_), (tar, *_) = (sorted((cache / "webdataset").glob(f"*.{kind}")) for kind in ("parquet", "tar"))
    index.unlink()
    for path in (file_of(cache, "tokens/fake"), file_of(cache, "tokens/other"), tar):
        spoil(path)
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert (done.code, problems_in(done)) == (0, [])
    assert f"damaged file=clips/{torn.name}" in done.err
    num_manifests = 4 if index.stem.partition("-")[0] == tar.stem.partition("-")[0] else 5
    assert f"repair manifests={num_manifests} files=5" in done.err
    assert f"repaired files=5 manifests={num_manifests} clips_failed=0" in done.err
    assert bytes_in(cache) == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ETIMEDOUT, errno.EIO])
def test_files_that_cannot_be_read_end_the_repair_before_anything_is_deleted(
    tokenmill: Command, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file_of(cache, "tokens/other").unlink()
    unread, plain = file_of(cache, "tokens/fake"), Folder.open
    before = bytes_in(cache)

    @contextlib.contextmanager
    def failing(folder: Folder, name: str) -> Iterator[BinaryIO]:
        with storage_errors(folder.uri(name)):
            if name.endswith(unread.name):
                raise OSError(number, os.strerror(number))
        with plain(folder, name) as stream:
            yield stream

    monkeypatch.setattr(Folder, "open", failing)
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert (done.code, bytes_in(cache) == before) == (1, True)
    assert f"{unread}: " in done.err
    assert "nothing was deleted: repair when it can be read" in " ".join(done.err.split())
    problems = problems_in(tokenmill("verify", "cache", "--deep"))
    (problem,) = [problem for problem in problems if unread.name in problem]
    assert "--repair" not in problem
    monkeypatch.undo()
    monkeypatch.chdir(cache.parent)
    assert tokenmill("verify", "cache", "--deep", "--repair").code == 0


def test_indexes_that_were_made_of_damaged_files_are_not_kept(tokenmill: Command, cache: Path) -> None:
    folder, checksums = Folder(str(cache)), "select name, row_group, crc32 from row_groups order by all"
    with open_index(folder) as connection:
        wanted = connection.execute(checksums).fetchall()
    both = (None, read_snapshot(folder, 1))
    for path in [ensure_index(folder, one) for one in both]:
        with duckdb.connect(path) as connection:
            connection.execute("update row_groups set crc32 = 0")
    spoil(file_of(cache, "tokens/fake"))
    assert tokenmill("verify", "cache", "--deep", "--repair").code == 0
    for one in both:
        with open_index(folder, one) as connection:
            assert connection.execute(checksums).fetchall() == wanted


def test_without_deep_what_a_listing_shows_is_mended(tokenmill: Command, cache: Path) -> None:
    before = bytes_in(cache)
    absent, changed = file_of(cache, "tokens/fake"), spoil(file_of(cache, "tokens/other"))
    absent.unlink()
    done = tokenmill("verify", "cache", "--repair")
    assert (done.code, "repair manifests=1 files=1" in done.err) == (0, True)
    (problem,) = problems_in(tokenmill("verify", "cache", "--deep"))
    assert problem.startswith(f"tokens/other/{changed.name}: damaged, SHA-256 ")
    assert tokenmill("verify", "cache", "--deep", "--repair").code == 0
    assert bytes_in(cache) == before


def test_a_whole_cache_is_left_as_it_is(tokenmill: Command, cache: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert (done.code, "nothing_to_repair" in done.err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == stamps


def test_damaged_and_lost_manifests_are_made_again(tokenmill: Command, cache: Path) -> None:
    before = bytes_in(cache)
    torn, lost = sorted((cache / "manifests" / "tokens" / "fake").iterdir())
    torn.write_bytes(torn.read_bytes()[:-9])
    lost.unlink()
    done = tokenmill("verify", "cache")
    assert (done.code, "damaged manifest" in done.err) == (1, True)
    done = tokenmill("verify", "cache", "--repair")
    assert (done.code, f"damaged file=manifests/tokens/fake/{torn.name}" in done.err) == (0, True)
    assert bytes_in(cache) == before


@pytest.mark.parametrize("change", ["gone", "another", "of the same size"])
def test_nothing_is_deleted_whose_source_is_gone_or_changed(
    tokenmill: Command, cache: Path, source: Path, footage: Path, change: str
) -> None:
    spoil(file_of(cache, "tokens/fake"))
    before, whole = bytes_in(cache), source.read_bytes()
    if change == "gone":
        source.unlink()
    elif change == "another":
        shutil.copy(footage / "bikes.mp4", source)
    else:
        spoil(source)
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert done.code == 1
    said = "video.mp4: it does not exist: check the path" if change == "gone" else "it has changed since it was planned"
    assert f"not_repaired file=tokens/fake/{file_of(cache, 'tokens/fake').name} " in done.err
    assert f"{said}: bring the source back" in done.err
    assert len(problems_in(done)) == 1
    assert bytes_in(cache) == before
    source.write_bytes(whole)  # its time is another now: it is read to see that it is the same
    assert tokenmill("verify", "cache", "--deep", "--repair").code == 0


def test_what_would_be_another_version_is_refused_before_anything_is_deleted(tokenmill: Command, cache: Path) -> None:
    spoil(file_of(cache, "tokens/fake"))
    before = bytes_in(cache)
    done = tokenmill("verify", "cache", "--deep", "--repair", "--set", "tokens.fake.batch_size=3")
    assert (done.code, "tokens/fake would be another version: its settings" in done.err) == (1, True)
    assert bytes_in(cache) == before
    assert "it changes what --repair runs" in tokenmill("verify", "cache", "--set", "executor.workers=2").err


def test_files_of_old_versions_stay_a_problem(tokenmill: Command, cache: Path) -> None:
    old = file_of(cache, "tokens/fake")
    write_recipe(cache.parent, TOKENS | {"fake": {"tokenizer": "fake", "batch_size": 3}})
    assert tokenmill("run", "recipe.yaml").code == 0
    old.unlink()
    done = tokenmill("verify", "cache", "--repair")
    assert done.code == 1
    assert "nothing_to_repair" in done.err
    (problem,) = problems_in(done)
    assert (
        problem
        == f"tokens/fake/{old.name}: no such file; tokens/fake has another version now: only old snapshots"
        + (" need it")
    )


def test_a_snapshot_of_a_file_that_came_out_otherwise_stays_damaged(
    tokenmill: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, victim = FakeTokenizer.encode, spoil(file_of(cache, "tokens/fake"))
    monkeypatch.setattr(FakeTokenizer, "encode", lambda self, frames_BTHWC: plain(self, 255 - frames_BTHWC))
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert done.code == 1
    assert f"other_bytes file=tokens/fake/{victim.name} " in done.err
    (problem,) = problems_in(done)
    assert problem.startswith(f"tokens/fake/{victim.name}: ")
    assert problem.endswith(
        "no such file: check the path; its shard is made of other files now: only old snapshots need it"
    )


def test_clips_that_fail_this_time_are_told(
    tokenmill: Command, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = repair.make_missing

    def without_source(*arguments: Any) -> Any:
        source.unlink()  # after it was seen
        return plain(*arguments)

    shutil.rmtree(cache / "snapshots")
    manifest = min((cache / "manifests" / "tokens" / "fake").iterdir())
    (file,) = json.loads(manifest.read_text())["files"]
    spoil(cache / file["name"])
    monkeypatch.setattr(repair, "make_missing", without_source)
    done = tokenmill("verify", "cache", "--deep", "--repair")
    assert (done.code, problems_in(done)) == (3, [])
    assert f"repaired files=0 manifests=1 clips_failed={file['num_rows']}" in done.err


def test_a_repair_that_was_cut_short_goes_on_when_it_is_run_again(
    tokenmill: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = bytes_in(cache)
    for path in (cache / "tokens" / "fake").iterdir():
        spoil(path)
    monkeypatch.setattr(repair, "make_missing", stop)
    assert tokenmill("verify", "cache", "--deep", "--repair").code == 75
    monkeypatch.undo()
    monkeypatch.chdir(cache.parent)
    gone = [line for line in problems_in(tokenmill("verify", "cache")) if "--repair makes it" in line]
    assert len(gone) == 2  # the snapshot names them
    done = tokenmill("verify", "cache", "--repair")
    assert (done.code, "repair manifests=0 files=0" in done.err) == (0, True)
    assert bytes_in(cache) == before


def test_json_lines_tell_what_was_done(tokenmill: Command, cache: Path) -> None:
    victim = file_of(cache, "tokens/fake")
    victim.unlink()
    done = tokenmill("verify", "cache", "--repair", "--log-json")
    events = {event["event"]: event for event in map(json.loads, done.out.splitlines())}
    assert done.code == 0
    assert events["damaged"]["file"] == f"tokens/fake/{victim.name}"
    assert (events["repaired"]["files"], events["verified"]["problems"]) == (1, 0)
    victim.unlink()
    done = tokenmill("verify", "cache", "--log-json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["event"] for event in events] == ["problem", "verified"]
    assert events[0]["problem"].startswith(
        f"tokens/fake/{victim.name}: no such file; --repair makes it again, or delete"
    )
