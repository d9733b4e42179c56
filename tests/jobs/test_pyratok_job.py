"""Jobs with PyraTok: levels of codes on real footage, from run to reconstruction, and the same by any worker."""

import hashlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tokenmill.pipeline.cache import open_cache
from tokenmill.tokenizers.pyratok import build_release
from tokenmill.tokenizers.pyratok_pyramid import PyramidSizes, build_pyramid, save_pyramid
from tokenmill.tokenizers.pyratok_quantizer import LatentStatistics
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from ..tokenizers.pyratok_kit import filled
from .conftest import Command
from .test_run import data_in

WriteRecipe = Callable[..., str]
SIZES = VaeSizes(base_dim=8, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
CLIPS = {"num_frames": 17, "height": 32, "width": 48}


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], str]:
    """weights(name): release.pt, or pyramid.safetensors on one grid or with native grids."""

    def path_of(name: str) -> str:
        path = str(tmp_path / name)
        if name.endswith(".pt"):
            torch.save({"model_state_dict": filled(build_release(SIZES), "job.").state_dict()}, path)
        else:
            sizes = PyramidSizes(native_grid="native" in name)
            statistics = LatentStatistics(mean=(0.1,) * 16, std=(0.5,) * 16)
            save_pyramid(filled(build_pyramid(SIZES, sizes, statistics), "job."), path)
        return path

    return path_of


def test_a_job_makes_levels_resumes_reconstructs_and_counts(
    tokenmill: Command, write_recipe: WriteRecipe, weights: Callable[[str], str], footage: Path, tmp_path: Path
) -> None:
    tokens = {
        "release": {"tokenizer": "pyratok/release", "weights": weights("release.pt")},
        "pyramid": {"tokenizer": "pyratok/pyramid", "weights": weights("pyramid.safetensors")},
        "native": {"tokenizer": "pyratok/pyramid", "weights": weights("native.safetensors")},
    }
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens)
    done = tokenmill("run", recipe)
    assert done.code == 0, done.err
    cache = open_cache(str(tmp_path / "cache"))
    clip_ids = cache.clips()["clip_id"].to_pylist()
    for product in ("release", "pyramid"):
        codes = cache.read(product, clip_ids)
        assert (codes.dtype, tuple(codes.shape[1:])) == (torch.int32, (5, 4, 6, 4))
        assert codes.max() > 32_768
        assert torch.equal(cache.read(product, clip_ids, levels=2), codes[..., :2])
    shapes = [tuple(level.shape[1:]) for level in cache.read_levels("native", clip_ids)]
    assert shapes == [(17, 16, 24), (9, 8, 12), (5, 4, 6), (5, 4, 6)]

    before = data_in(tmp_path / "cache")
    for folder in ("tokens/release", "manifests/tokens/release"):
        min((tmp_path / "cache" / folder).iterdir()).unlink()
    shutil.rmtree(tmp_path / "cache" / "manifests" / "tokens" / "native")
    assert tokenmill("run", recipe).code == 0
    assert data_in(tmp_path / "cache") == before

    for product in ("release", "pyramid", "native"):
        for levels in ((), ("--levels", "2")):
            done = tokenmill("reconstruct", "cache", clip_ids[0], f"{product}.mp4", "--product", product, *levels)
            assert done.code == 0, done.err
            assert "PSNR" in done.out
    done = tokenmill("verify", "cache", "--deep", "--retokenize", "1", "--quality", "0.5")
    assert done.code == 0, done.out
    assert done.out.count("codes differ, in 0 of") == 3
    done = tokenmill("reconstruct", "cache", clip_ids[0], "x.mp4", "--product", "native", "--levels", "5")
    assert (done.code, "tokens/native: 5 levels were asked for: it has 1 to 4" in done.err) == (1, True)
    done = tokenmill("sql", "cache", "select level, num_codes from code_statistics('native')", "--format", "csv")
    counts = [len(np.unique(level.numpy())) for level in cache.read_levels("native", clip_ids)]
    assert done.out.split() == ["level,num_codes", *(f"{n},{count}" for n, count in enumerate(counts, start=1))]
    options = cache.sql("select options from products where product = 'tokens/pyramid'")["options"][0].as_py()
    assert '"text_sha256": null' in options
    assert '"std": [0.5' in options


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "grid"),
    [
        (17, 32, 64, (5, 4, 8)),
        (9, 16, 16, (3, 2, 2)),
        (1, 32, 32, (1, 4, 4)),
        (97, 8, 16, (25, 1, 2)),
        (16, 8, 8, (5, 1, 1)),
    ],
)
def test_bytes_are_two_for_each_code(
    tokenmill: Command,
    write_recipe: WriteRecipe,
    weights: Callable[[str], str],
    footage: Path,
    tmp_path: Path,
    num_frames: int,
    height: int,
    width: int,
    grid: tuple[int, int, int],
) -> None:
    tokens = {"codes": {"tokenizer": "pyratok/release", "weights": weights("release.pt")}}
    clips = {"num_frames": num_frames, "height": height, "width": width, "stride": 97}
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=clips, tokens=tokens)
    assert tokenmill("run", recipe).code == 0
    cache = open_cache(str(tmp_path / "cache"))
    assert cache.info.products["tokens/codes"].shape == (*grid, 4)
    for path in (tmp_path / "cache" / "tokens" / "codes").iterdir():
        group = pq.read_metadata(path).row_group(0)
        widths = [group.column(i).path_in_schema for i in range(group.num_columns)]
        schema = pq.read_schema(path)
        sizes = [schema.field(name).type.byte_width for name in widths if name.startswith("level_")]
        assert sizes == [2 * math.prod(grid)] * 4


@pytest.mark.parametrize("name", ["pyramid.safetensors", "native.safetensors"])
def test_levels_are_in_tars_and_estimates_too(
    tokenmill: Command,
    write_recipe: WriteRecipe,
    weights: Callable[[str], str],
    footage: Path,
    tmp_path: Path,
    name: str,
) -> None:
    tokens = {"codes": {"tokenizer": "pyratok/pyramid", "weights": weights(name)}}
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens)
    done = tokenmill("run", recipe, "--set", "shards.format=both")
    assert done.code == 0, done.err
    assert tokenmill("export", "webdataset", "cache", "tars").code == 0
    cache = open_cache(str(tmp_path / "cache"))
    levels = cache.info.products["tokens/codes"].levels
    for path in [*(tmp_path / "cache" / "webdataset").glob("*.tar"), *(tmp_path / "tars").glob("*.tar")]:
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                data = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                clip_id = member.name.partition(".")[0]
                if member.name.endswith(".npy"):
                    found = np.load(io.BytesIO(data))
                    assert found.dtype == np.uint16
                    assert np.array_equal(found, cache.read("codes", [clip_id])[0].numpy())
                else:
                    said = json.loads(data)["products"]["codes"]
                    assert tuple(map(tuple, said["levels"])) == levels
    done = tokenmill("estimate", recipe, "--set", "cache=other", "--clips", "2")
    assert done.code == 0, done.err
    num_tokens = sum(math.prod(grid) for grid in levels) * len(cache.clips())
    assert f"{num_tokens:,}" in done.out


def test_a_text_moves_codes_and_is_recorded(
    tokenmill: Command, write_recipe: WriteRecipe, weights: Callable[[str], str], footage: Path, tmp_path: Path
) -> None:
    path, text = weights("pyramid.safetensors"), "A man is talking"
    tokens = {
        "plain": {"tokenizer": "pyratok/pyramid", "weights": path},
        "told": {"tokenizer": "pyratok/pyramid", "weights": path, "options": {"text": text, "text_scale": 2}},
    }
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens)
    assert tokenmill("run", recipe).code == 0
    cache = open_cache(str(tmp_path / "cache"))
    clip_ids = cache.clips()["clip_id"].to_pylist()
    assert (cache.read("plain", clip_ids) != cache.read("told", clip_ids)).any()
    options = (cache.info.products["tokens/told"].tokenizer or {})["options"]
    assert options["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert options["text_scale"] == 2


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bytes(
    write_recipe: WriteRecipe, weights: Callable[[str], str], footage: Path, tmp_path: Path
) -> None:
    tokens = {"codes": {"tokenizer": "pyratok/pyramid", "weights": weights("native.safetensors")}}
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens, shards={"frames": 17})
    for way in ("whole", "hurt"):
        command = [sys.executable, "-c", "from tokenmill.jobs.main import main; main()", "run", recipe]
        command += ["--set", f"cache={tmp_path / way}"]
        if way == "hurt":
            driver = subprocess.Popen(command, cwd=tmp_path)
            while not list((tmp_path / way).glob("manifests/tokens/codes/*")):
                assert driver.poll() is None
            driver.send_signal(signal.SIGKILL)
            assert driver.wait() == -signal.SIGKILL
            assert len(list((tmp_path / way).glob("manifests/tokens/codes/*"))) < 7
        subprocess.run(command, cwd=tmp_path, check=True)
    whole, hurt = (
        {name: digest for name, digest in data_in(tmp_path / way).items() if name.startswith(("clips", "tokens"))}
        for way in ("whole", "hurt")
    )
    assert whole == hurt
    assert len(whole) == 14


@pytest.mark.slow
@pytest.mark.ray
def test_codes_are_the_same_by_any_worker_and_batch(
    tokenmill: Command, write_recipe: WriteRecipe, weights: Callable[[str], str], footage: Path, tmp_path: Path
) -> None:
    tokens = {"codes": {"tokenizer": "pyratok/pyramid", "weights": weights("pyramid.safetensors")}}
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens)
    ways = {"local": (), "batch": ("--set", "tokens.codes.batch_size=3")}
    ways |= {f"ray{n}": ("--executor", "ray", "--set", f"executor.workers={n}") for n in (1, 2)}
    for way, options in ways.items():
        done = tokenmill("run", recipe, *options, "--set", f"cache={way}")
        assert done.code == 0, done.err
    files = {
        way: {n: d for n, d in data_in(tmp_path / way).items() if n.startswith(("clips", "tokens"))} for way in ways
    }
    assert files["local"] == files["ray1"] == files["ray2"]
    caches = [open_cache(str(tmp_path / way)) for way in ("local", "batch")]
    clip_ids = caches[0].clips()["clip_id"].to_pylist()
    assert torch.equal(*(cache.read("codes", clip_ids) for cache in caches))


def test_settings_that_pyratok_does_not_take_are_refused(
    tokenmill: Command, write_recipe: WriteRecipe, weights: Callable[[str], str], footage: Path
) -> None:
    release, pyramid = weights("release.pt"), weights("pyramid.safetensors")
    cases = [
        ({"tokenizer": "pyratok/releas", "weights": release}, "no variant 'releas' (did you mean 'release'?)"),
        ({"tokenizer": "pyratok/release"}, "needs its weights: set weights to the path or URL of a checkpoint"),
        ({"tokenizer": "pyratok/pyramid", "weights": release}, "not those of a PyraTok pyramid"),
        ({"tokenizer": "pyratok/release", "weights": release, "logvar": True}, "without logvar: remove logvar"),
        ({"tokenizer": "pyratok/release", "weights": release, "compiled": True}, "remove compiled"),
        ({"tokenizer": "pyratok/release", "weights": release, "options": {"text": "a"}}, "options.text: unknown key"),
        ({"tokenizer": "pyratok/pyramid", "weights": pyramid, "options": {"text_scale": 2}}, "set options.text"),
        ({"tokenizer": "pyratok/pyramid", "weights": pyramid, "stored_dtype": "float16"}, "remove stored_dtype"),
    ]
    for section, said in cases:
        recipe = write_recipe([footage], clips=CLIPS, tokens={"codes": section})
        done = tokenmill("run", recipe)
        assert (done.code, said in done.err) == (2, True), done.err
    recipe = write_recipe(
        [footage], clips=CLIPS, tokens={"codes": {"tokenizer": "pyratok/release", "weights": release}}
    )
    done = tokenmill("run", recipe, "--set", "clips.width=42")
    assert (done.code, "multiple of 8, found 42: set clips.width=40" in done.err) == (2, True), done.err
