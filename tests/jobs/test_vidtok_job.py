"""Jobs with VidTok: codes and latents on real footage, from run to reconstruction."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenmill.jobs.build import recipe_of
from tokenmill.pipeline.cache import open_cache
from tokenmill.pipeline.encode import USUAL_BATCH
from tokenmill.tokenizers import vidtok_model
from tokenmill.tokenizers.vidtok import build

from ..pipeline.test_metrics import lpips_tensors
from ..tokenizers.vidtok_kit import filled
from .conftest import Command
from .test_run import data_in

WriteRecipe = Callable[..., str]
CLIPS = {"num_frames": 17, "height": 32, "width": 48}


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], str]:
    """weights(name): a checkpoint as published, with the key that wraps its tensors."""

    def path_of(name: str) -> str:
        path = tmp_path / f"vidtok_{name}.ckpt"
        if not path.exists():
            torch.save({"state_dict": filled(build(name)).state_dict()}, path)
        return str(path)

    return path_of


def test_a_job_makes_codes_and_latents_resumes_and_reconstructs(
    tokenmill: Command,
    write_recipe: WriteRecipe,
    weights: Callable[[str], str],
    footage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vidtok_model, "WIDTH", 16)
    tokens = {
        "codes": {"tokenizer": "vidtok/fsq_causal_488_262144", "weights": weights("fsq_causal_488_262144")},
        "latents": {
            "tokenizer": "vidtok/kl_causal_288_8chn_v1_1",
            "weights": weights("kl_causal_288_8chn_v1_1"),
            "logvar": True,
            "stored_dtype": "bfloat16",
        },
    }
    recipe = write_recipe([footage / "carphone_pristine.mp4"], clips=CLIPS, tokens=tokens)
    done = tokenmill("run", recipe)
    assert done.code == 0, done.err
    cache = open_cache(str(tmp_path / "cache"))
    clip_ids = cache.clips("num_valid = 17")["clip_id"].to_pylist()
    codes, latents = cache.read("codes", clip_ids), cache.read("latents", clip_ids)
    assert (codes.dtype, tuple(codes.shape[1:])) == (torch.int32, (5, 4, 6))
    assert codes.max() > 65_535
    assert (latents.dtype, tuple(latents.shape[1:])) == (torch.bfloat16, (9, 4, 6, 16))

    before = data_in(tmp_path / "cache")
    for folder in ("tokens/codes", "manifests/tokens/codes"):
        min((tmp_path / "cache" / folder).iterdir()).unlink()
    shutil.rmtree(tmp_path / "cache" / "manifests" / "tokens" / "latents")
    assert tokenmill("run", recipe).code == 0
    assert data_in(tmp_path / "cache") == before

    for product in ("codes", "latents"):
        options = ("--product", product, "--png", f"{product}.png")
        done = tokenmill("reconstruct", "cache", clip_ids[0], f"{product}.mp4", *options)
        assert done.code == 0, done.err
        assert "17 frames" in done.out
        assert (tmp_path / f"{product}.png").stat().st_size > 1000
    done = tokenmill("verify", "cache", "--deep", "--retokenize", "1", "--quality", "0.5")
    assert done.code == 0, done.out
    assert "codes differ, in 0 of" in done.out
    assert "largest error 0, mean 0" in done.out
    assert "PSNR" in done.out
    torch.save({"state_dict": lpips_tensors()}, tmp_path / "lpips.ckpt")
    done = tokenmill("verify", "cache", "--quality", "0", "--lpips", "lpips.ckpt")
    assert done.code == 0, done.err
    assert "LPIPS" in done.out
    done = tokenmill("verify", "cache", "--quality", "0", "--lpips", weights("fsq_causal_488_262144"))
    assert done.code == 1
    assert "for LPIPS: give a checkpoint of VidTok" in done.err
    torch.save(build("fsq_causal_488_262144").state_dict(), tmp_path / "vidtok_fsq_causal_488_262144.ckpt")
    for command in (
        ("verify", "cache", "--quality", "0"),
        ("reconstruct", "cache", clip_ids[0], "x.mp4", "--product=codes"),
    ):
        done = tokenmill(*command)
        assert done.code == 1
        assert "tokens/codes was made by another tokenizer than is here (weights_sha256" in done.err


def test_a_batch_size_is_chosen_once_and_kept(tokenmill: Command, write_recipe: WriteRecipe, footage: Path) -> None:
    recipe = write_recipe([footage / "carphone_pristine.mp4"], tokens={"fake": {"tokenizer": "fake"}})
    assert tokenmill("run", recipe, "--set", "tokens.fake.batch_size=3").code == 0
    done = tokenmill("run", recipe, "--set", "tokens.fake.batch_size=auto")
    assert (done.code, "clips=0 shards=0" in done.err) == (0, True)
    assert recipe_of(open_cache("cache").info).tokens["fake"].batch_size == 3
    done = tokenmill("run", recipe, "--set", "tokens.fake.batch_size=auto", "--set", "cache=other")
    assert done.code == 0
    assert recipe_of(open_cache("other").info).tokens["fake"].batch_size == USUAL_BATCH


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_driver_of_ray_workers_needs_no_gpu(tokenmill: Command, write_recipe: WriteRecipe, footage: Path) -> None:
    recipe = write_recipe([footage / "carphone_pristine.mp4"], tokens={"dct": {"tokenizer": "dct_fsq/488_262144"}})
    options = ("--set", "tokens.dct.device=cuda", "--set", "clips.num_frames=8")
    done = tokenmill("plan", recipe, *options)
    assert (done.code, "torch finds 0 GPUs here" in done.err) == (2, True)
    done = tokenmill("plan", recipe, *options, "--set", "executor.kind=ray")
    assert done.code == 0, done.err
    assert recipe_of(open_cache("cache").info).tokens["dct"].device == "cuda"


def test_settings_that_a_tokenizer_does_not_take_are_refused(
    tokenmill: Command, write_recipe: WriteRecipe, footage: Path
) -> None:
    recipe = write_recipe([footage])
    for change, message in {
        "stored_dtype=float16": "fake makes codes, whose number type is given: remove stored_dtype",
        "logvar=true": "fake has no variances: remove logvar",
        "batch_size=automatic": "batch_size",
    }.items():
        done = tokenmill("run", recipe, "--set", f"tokens.fake.{change}")
        assert done.code == 2
        assert message in done.err


@pytest.mark.ray
@pytest.mark.slow
def test_whole_networks_make_the_same_files_by_any_worker_and_after_a_kill(
    write_recipe: WriteRecipe, weights: Callable[[str], str], make_video: Callable[..., str], tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(4):
        shutil.copy(make_video(num_frames=34, width=64, height=64), videos / f"{i}.mp4")
        with (videos / f"{i}.mp4").open("ab") as stream:
            stream.write((16).to_bytes(4, "big") + b"free" + f"{i:08d}".encode())
    name = "fsq_causal_488_32768"
    tokens = {"codes": {"tokenizer": f"vidtok/{name}", "weights": weights(name)}}
    recipe = write_recipe([videos], clips={"num_frames": 17, "height": 64, "width": 64}, tokens=tokens)
    ways = {"local": [], "hurt": [], "ray": ["--executor", "ray", "--set", "executor.workers=2"]}
    for way, options in ways.items():
        command = [sys.executable, "-c", "from tokenmill.jobs.main import main; main()", "run", recipe]
        command += [*options, "--set", f"cache={tmp_path / way}", "--set", "shards.frames=40"]
        if way == "hurt":
            driver = subprocess.Popen(command, cwd=tmp_path)
            while not list((tmp_path / way).glob("manifests/tokens/codes/*")):
                assert driver.poll() is None
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        subprocess.run(command, cwd=tmp_path, check=True)
    local, hurt, ray = (
        {name: digest for name, digest in data_in(tmp_path / way).items() if name.startswith(("clips", "tokens"))}
        for way in ways
    )
    assert local == hurt == ray
    assert len(local) == 6  # three shards
