"""The verify command: every damage is named, and what it says to do mends the cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import torch

from tokenmill.jobs.retokenize import Comparison

from .conftest import Command

WriteRecipe = Callable[..., str]
SIZE = {"num_frames": 16, "height": 64, "width": 96}
DCT = {"dct": {"tokenizer": "dct_fsq/488_262144"}}


@pytest.fixture
def cache(tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path) -> Path:
    """Two shards of 8 clips in all."""
    assert tokenmill("run", write_recipe([footage / "carphone_pristine.mp4"], clips=SIZE, tokens=DCT)).code == 0
    return tmp_path / "cache"


def problems_of(tokenmill: Command, *options: str) -> list[str]:
    done = tokenmill("verify", "cache", *options)
    problems = [line.removeprefix("problem: ") for line in done.out.splitlines() if line.startswith("problem: ")]
    assert done.code == (1 if problems else 0), done.err
    return problems


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_an_intact_cache_verifies(tokenmill: Command, cache: Path) -> None:
    assert tokenmill("snapshot", "cache").code == 0
    shallow, deep = tokenmill("verify", "cache"), tokenmill("verify", "cache", "--deep")
    assert (shallow.code, deep.code) == (0, 0)
    assert "files: 6 looked up by name and size, 0 problems" in shallow.out
    assert "files: 6 read against their SHA-256 and row counts, 0 problems" in deep.out


def test_absent_and_torn_files_are_seen_without_reading(tokenmill: Command, cache: Path) -> None:
    torn, absent = sorted((cache / "tokens" / "dct").iterdir())
    size_bytes = torn.stat().st_size
    torn.write_bytes(torn.read_bytes()[:-1])
    absent.unlink()
    one, other = problems_of(tokenmill)
    assert one.startswith(f"tokens/dct/{torn.name}: {size_bytes - 1} bytes, committed {size_bytes}; --repair makes")
    assert other.startswith(
        f"tokens/dct/{absent.name}: no such file; --repair makes it again, or delete it and manifests/"
    )


@pytest.mark.parametrize("folder", ["tokens/dct", "clips", "plan"])
def test_changed_bytes_are_seen_by_reading(tokenmill: Command, cache: Path, folder: str) -> None:
    victim = next((cache / folder).glob("*-*.parquet"))
    flip(victim)
    assert problems_of(tokenmill) == []
    (problem,) = problems_of(tokenmill, "--deep")
    assert problem.startswith(f"{folder}/{victim.name}: damaged, SHA-256 ")


def test_a_lost_manifest_is_missing_clips(tokenmill: Command, cache: Path) -> None:
    manifest = next((cache / "manifests" / "tokens" / "dct").iterdir())
    num_clips = sum(file["num_rows"] for file in json.loads(manifest.read_text())["files"])
    manifest.unlink()
    assert problems_of(tokenmill) == [
        f"tokens/dct: planned 8, committed {8 - num_clips}, failed 0, quarantined 0: {num_clips} clips are missing;"
        f" run the recipe again"
    ]


def test_what_verify_says_to_do_mends_the_cache(tokenmill: Command, cache: Path) -> None:
    victim = next((cache / "tokens" / "dct").iterdir())
    victim.write_bytes(b"torn")
    (problem,) = problems_of(tokenmill)
    manifest = problem.partition("delete it and ")[2].partition(",")[0]
    victim.unlink()
    (cache / manifest).unlink()
    assert tokenmill("run", "recipe.yaml").code == 0
    assert problems_of(tokenmill, "--deep") == []
    assert victim.exists()


def test_rows_that_were_committed_twice_are_seen(tokenmill: Command, cache: Path) -> None:
    """As no job of ours can do it: the rows of one shard in another one's name."""
    one, other = sorted((cache / "manifests" / "clips").iterdir())
    values = json.loads(one.read_text())
    values["files"] += json.loads(other.read_text())["files"]
    one.write_text(json.dumps(values))
    (problem,) = problems_of(tokenmill)
    assert "clips too many: some were committed twice" in problem


def test_a_damaged_snapshot_is_a_problem(tokenmill: Command, cache: Path) -> None:
    assert tokenmill("snapshot", "cache").code == 0
    next((cache / "snapshots").glob("manifests-*")).write_bytes(b"torn")
    (problem,) = problems_of(tokenmill)
    assert "snapshot 1 can no longer be read" in problem


def test_files_that_only_a_snapshot_needs_are_checked_too(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, cache: Path
) -> None:
    assert tokenmill("snapshot", "cache").code == 0
    (victim, *_) = (cache / "tokens" / "dct").iterdir()
    other = {"dct": DCT["dct"] | {"batch_size": 3}}
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=SIZE, tokens=other)
    assert tokenmill("run", recipe).code == 0
    victim.unlink()
    (problem,) = problems_of(tokenmill)
    assert problem == (
        f"tokens/dct/{victim.name}: no such file; tokens/dct has another version now: only old snapshots need it"
    )


def test_a_sample_that_is_made_again_is_the_same(tokenmill: Command, cache: Path) -> None:
    done = tokenmill("verify", "cache", "--retokenize", "0.25")
    assert done.code == 0, done.out
    num_codes = 2 * 4 * 8 * 12
    assert f"made again: tokens/dct: 0 of {num_codes} codes differ, in 0 of 2 clips" in done.out
    assert "in 0 of 1 clips" in tokenmill("verify", "cache", "--retokenize", "0").out
    assert "in 0 of 8 clips" in tokenmill("verify", "cache", "--retokenize", "1").out


def test_tokens_that_are_made_otherwise_are_counted(tokenmill: Command, cache: Path) -> None:
    """The index of another file's rows: every code of the clips that trade places is compared with a stranger's."""
    with duckdb.connect(str(cache / "index.duckdb")) as index:
        index.execute("""update "places of tokens/dct" p set row_in_file = (select max(row_in_file)
                         from "places of tokens/dct" l where l.file = p.file) - row_in_file""")
    (problem,) = problems_of(tokenmill, "--retokenize", "1")
    differ = int(problem.removeprefix("tokens/dct: ").split()[0].replace(",", ""))
    assert 100 < differ <= 8 * 384
    assert "codes differ, in " in problem
    assert ", for instance " in problem


def test_a_source_that_changed_cannot_be_made_again(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path, tmp_path: Path
) -> None:
    source = tmp_path / "video.mp4"
    shutil.copy(footage / "carphone_pristine.mp4", source)
    assert tokenmill("run", write_recipe([source], clips=SIZE, tokens=DCT)).code == 0
    shutil.copy(footage / "carphone_distorted.mp4", source)
    problems = problems_of(tokenmill, "--retokenize", "0.25")
    assert len(problems) == 2
    assert all("the source cannot be read again: the file has changed since it was planned" in p for p in problems)


def test_damage_is_mended_before_clips_are_made_again(tokenmill: Command, cache: Path) -> None:
    next((cache / "clips").iterdir()).unlink()
    assert "no clip was made again: mend the files first" in tokenmill("verify", "cache", "--retokenize", "1").out


@pytest.mark.parametrize(("error", "is_close"), [(0.0, True), (3e-6, True), (2e-4, False)])
def test_latents_may_differ_by_what_an_order_of_sums_makes(error: float, is_close: bool) -> None:
    comparison = Comparison(product="tokens/vae", dtype="float32")
    stored = torch.linspace(-1, 1, 24).reshape(2, 1, 3, 2, 2)
    made = stored.clone()
    made[1, 0, 0, 0, 0] += error
    comparison.add(["a", "b"], stored, made)
    assert comparison.is_close == is_close
    assert comparison.num_clips == 2
    assert comparison.other_clip_ids == (["b"] if error else [])
    largest = f"{abs(float(made[1, 0, 0, 0, 0]) - float(stored[1, 0, 0, 0, 0])):.3g}"
    assert f"largest error {largest}, mean " in comparison.figures()
    assert "tolerance 0.0001 of that" in comparison.figures()


def test_latents_that_are_no_numbers_are_never_close() -> None:
    comparison = Comparison(product="tokens/vae", dtype="float32")
    comparison.add(["a"], torch.full((1, 1, 1, 1, 2), float("nan")), torch.zeros(1, 1, 1, 1, 2))
    assert not comparison.is_close
    assert comparison.other_clip_ids == ["a"]


@pytest.mark.parametrize(("margin", "is_close"), [(1e-5, True), (1e-3, False)])
def test_codes_may_differ_next_to_a_rounding_boundary_alone(margin: float, is_close: bool) -> None:
    comparison = Comparison(product="tokens/fsq", dtype=None)
    stored, made = torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[[[1, 2, 4]]]])
    comparison.add(["a"], stored, made, lambda: torch.tensor([[[[0.2, 0.3, margin]]]]))
    assert comparison.is_close == is_close
    near = " (1 next to a rounding boundary)" if is_close else ""
    assert f"1 of 3 codes differ{near}, in 1 of 1 clips" in comparison.figures()
