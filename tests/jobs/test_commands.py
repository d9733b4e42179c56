"""The commands around a job: plan, estimate, status, sql, reconstruct, index."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from .conftest import Command

WriteRecipe = Callable[..., str]
SIZE = {"num_frames": 16, "height": 64, "width": 96}
DCT = {"dct": {"tokenizer": "dct_fsq/488_262144"}}


@pytest.fixture
def recipe(write_recipe: WriteRecipe, footage: Path) -> str:
    return write_recipe([footage / "carphone_pristine.mp4"], clips=SIZE, tokens=DCT)


@pytest.fixture
def cache(tokenmill: Command, recipe: str, tmp_path: Path) -> Path:
    assert tokenmill("run", recipe).code == 0
    return tmp_path / "cache"


def first_clip(tokenmill: Command) -> str:
    return tokenmill("sql", "cache", "select clip_id from clips order by start_s", "--format", "csv").out.split()[1]


def test_a_plan_can_be_made_first_and_is_the_one_that_runs(tokenmill: Command, recipe: str, tmp_path: Path) -> None:
    planned = tokenmill("plan", recipe)
    assert (planned.code, "clips=8" in planned.err) == (0, True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "plan").iterdir()}
    assert not (tmp_path / "cache" / "tokens").exists()
    assert tokenmill("status", "cache").out.count("8 clips are not made yet: run the recipe again to resume") == 2
    assert tokenmill("run", recipe).code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache" / "plan").iterdir()} == before


def test_an_estimate_of_everything_is_what_the_job_makes(tokenmill: Command, recipe: str, tmp_path: Path) -> None:
    one_shard = ["--set", "shards.frames=16384"]
    estimate = tokenmill("estimate", recipe, *one_shard)
    assert estimate.code == 0, estimate.err
    assert not (tmp_path / "cache").exists()
    assert "1 of 1 videos probed" in estimate.out
    assert "8 clips, 120 frames" in estimate.out
    assert "hours on one worker" in estimate.out
    tokenmill("run", recipe, *one_shard)
    size = sum(path.stat().st_size for path in (tmp_path / "cache" / "tokens" / "dct").iterdir())
    (row,) = [line.split() for line in estimate.out.splitlines() if line.strip().startswith("tokens/dct")]
    assert row[1] == f"{8 * 4 * 8 * 12:,}"
    assert abs(int(row[-1].replace(",", "")) * 8 - size) < 0.02 * size


def test_an_estimate_of_a_sample_is_scaled(tokenmill: Command, write_recipe: WriteRecipe, footage: Path) -> None:
    sampled = tokenmill("estimate", write_recipe([footage]), "--videos", "2", "--clips", "5")
    assert "2 of 4 videos probed" in sampled.out
    assert "5 clips made" in sampled.out
    assert "about" in sampled.out


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_answers_come_in_every_format(tokenmill: Command, cache: Path, format: str, tmp_path: Path) -> None:
    query = "select clip_id, num_valid, frame_pts_s from clips order by clip_id"
    output = tmp_path / f"answer.{format}"
    assert tokenmill("sql", "cache", query, "--format", format, "--output", str(output)).code == 0
    reader = {"csv": "read_csv", "json": "read_json", "parquet": "read_parquet"}[format]
    rows = duckdb.sql(f"select clip_id, num_valid from {reader}('{output}') order by clip_id").fetchall()
    assert len(rows) == 8
    assert {row[1] for row in rows} == {16, 8}


def test_parquet_goes_to_standard_output_when_it_is_redirected(tokenmill: Command, cache: Path) -> None:
    answer = tokenmill("sql", "cache", "select 7 as x", "--format", "json")
    assert json.loads(answer.out) == {"x": 7}


def test_long_lists_and_tables_are_cut_in_print(tokenmill: Command, cache: Path) -> None:
    printed = tokenmill("sql", "cache", "select codes from tokens_dct", "--max-rows", "2").out
    assert "384 in all" in printed
    assert "8 rows, the first 2 shown" in printed


def test_a_wrong_query_is_one_line(tokenmill: Command, cache: Path) -> None:
    done = tokenmill("sql", "cache", "select nothing from clips")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert done.err.startswith('tokenmill: the query failed: Binder Error: Referenced column "nothing" not found')


def test_a_reconstruction_shows_source_and_tokens_side_by_side(
    tokenmill: Command, cache: Path, tmp_path: Path, footage: Path
) -> None:
    clip_id = first_clip(tokenmill)
    done = tokenmill("reconstruct", "cache", clip_id[:10], "out.mp4", "--png", "out.png")
    assert done.code == 0, done.err
    assert float(done.out.rpartition("PSNR ")[2].split()[0]) > 20
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert frames[0].shape == (64, 2 * 96 + 8, 3)
    left, right = frames[5][:, :96].astype(float), frames[5][:, 104:].astype(float)
    assert 1 < np.abs(left - right).mean() < 20
    with av.open(io.BytesIO((tmp_path / "out.png").read_bytes())) as picture:
        assert next(picture.decode(video=0)).to_ndarray(format="rgb24").shape == (128, 8 * 96, 3)


def test_a_reconstruction_of_nothing_is_refused(tokenmill: Command, cache: Path) -> None:
    assert "no clip begins with 'ffff0000'" in tokenmill("reconstruct", "cache", "ffff0000", "x.mp4").err
    clip_id = first_clip(tokenmill)
    assert (
        "no product tokens/dtc (did you mean 'dct'?)"
        in tokenmill("reconstruct", "cache", clip_id, "x.mp4", "--product", "dtc").err
    )
    assert "no such file" in tokenmill("reconstruct", "cache", clip_id, "no/folder/x.mp4").err


def test_the_index_can_be_deleted_and_rebuilt(tokenmill: Command, cache: Path) -> None:
    (cache / "index.duckdb").unlink()
    assert tokenmill("index", "cache").out.strip() == str(cache / "index.duckdb")
    assert (cache / "index.duckdb").exists()


def test_token_files_carry_the_products_fingerprint(cache: Path) -> None:
    info = json.loads((cache / "products" / "tokens" / "dct" / "1.json").read_text())
    for path in (cache / "tokens" / "dct").iterdir():
        assert pq.read_schema(path).metadata[b"tokenmill.fingerprint"].decode() == info["fingerprint"]


@pytest.mark.parametrize("command", ["status", "verify", "index", "sql", "reconstruct", "retry", "snapshot", "gc"])
def test_a_place_without_a_cache_is_said_by_every_command(tokenmill: Command, command: str) -> None:
    rest = {"sql": ["select 1"], "reconstruct": ["abc", "x.mp4"]}.get(command, [])
    done = tokenmill(command, "nowhere", *rest)
    assert done.code == 1
    assert "nowhere: no token cache there (no cache.json): make one with tokenmill run, or check the path" in done.err


def test_status_says_where_the_workers_time_went(tokenmill: Command, cache: Path) -> None:
    (line,) = [line for line in tokenmill("status", "cache").out.splitlines() if line.startswith("workers: ")]
    shares = [int(part.split()[-1].rstrip("%")) for part in line.partition(" of ")[0].split(", ")]
    assert [part.rpartition(" ")[0] for part in line.removeprefix("workers: ").partition(" of ")[0].split(", ")] == [
        "decode wait",
        "segment",
        "embed",
        "tokenize",
        "write",
    ]
    assert 97 <= sum(shares) <= 103
    seconds = json.loads(tokenmill("status", "cache", "--log-json").out)["worker_s"]
    manifests = [json.loads(path.read_text())["timings_s"] for path in (cache / "manifests" / "clips").iterdir()]
    assert seconds["decode wait"] == pytest.approx(sum(timings["decode"] for timings in manifests))
    assert seconds["tokenize"] == pytest.approx(sum(timings["tokenize"] for timings in manifests))


def test_columns_of_one_name_keep_their_values(tokenmill: Command, cache: Path) -> None:
    printed = tokenmill("sql", "cache", "select 17 as a, 29 as a").out
    assert printed.split()[-4:] == ["17", "29", "1", "rows"]


def test_an_output_replaces_the_old_one_only_when_it_is_whole(tokenmill: Command, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.csv").write_text("old")
    assert tokenmill("sql", "cache", "select 1 / 'x'", "--format", "csv", "-o", "answer.csv").code == 1
    assert (tmp_path / "answer.csv").read_text() == "old"
    assert tokenmill("reconstruct", "cache", first_clip(tokenmill), "out.anything").code == 0
    assert (tmp_path / "out.anything").read_bytes()[4:8] == b"ftyp"
    assert not list(tmp_path.glob(".*.out.anything"))


def test_tokens_that_are_in_tars_only_are_said_to_be(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path
) -> None:
    recipe = write_recipe([footage / "carphone_pristine.mp4"], shards={"format": "webdataset"})
    assert tokenmill("run", recipe).code == 0
    for options in ([], ["--product", "fake"]):
        done = tokenmill("reconstruct", "cache", first_clip(tokenmill), "x.mp4", *options)
        assert (done.code, "its tokens are in tars only (shards.format=webdataset)" in done.err) == (1, True)
    assert tokenmill("verify", "cache", "--deep").code == 0
    assert "there is none with all its tokens in Parquet" in tokenmill("verify", "cache", "--retokenize", "1").out
    assert tokenmill("retry", "cache").code == 0
