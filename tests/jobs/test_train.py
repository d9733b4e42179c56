"""Training a pyramid through the real command: what it writes, how it resumes, and what it refuses."""

import csv
import fcntl
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenmill.jobs.training_output import add_metrics, cut_metrics
from tokenmill.jobs.training_steps import Learner, learning_rate_at
from tokenmill.pipeline.storage import Folder
from tokenmill.schemas.errors import TokenizerError
from tokenmill.schemas.training import LearningSection
from tokenmill.tokenizers.load import load_tokenizer
from tokenmill.tokenizers.pyratok import build_release
from tokenmill.tokenizers.pyratok_losses import PyramidTraining
from tokenmill.tokenizers.pyratok_pyramid import PyramidFile, PyramidSizes, build_pyramid
from tokenmill.tokenizers.pyratok_vae import VaeSizes

from ..conftest import MakeVideo
from .conftest import Command

TINY = {
    "base_dim": 8, "z_dim": 8, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]
}  # fmt: skip
STEPS, EVERY = 12, 4
WriteTraining = Callable[..., str]


@pytest.fixture(scope="session")
def videos(make_video: MakeVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three videos, which have 5, 4 and 3 clips of five frames."""
    folder = tmp_path_factory.mktemp("videos")
    for name, (num_frames, width) in {"a": (25, 32), "b": (20, 48), "c": (13, 32)}.items():
        shutil.copy(make_video(num_frames=num_frames, width=width, height=32), folder / f"{name}.mp4")
    return folder


@pytest.fixture
def source(videos: Path, tmp_path: Path) -> Path:
    """A copy of the videos, which a test may change."""
    return Path(shutil.copytree(videos, tmp_path / "source"))


@pytest.fixture
def write_training(source: Path, tmp_path: Path) -> WriteTraining:
    """write_training(output="out", sources=[...], model={...}, steps=12, ...): the path of a tiny training's recipe."""

    def write(
        *, sources: Any = None, clips: Any = None, model: Any = None, output: str = "out", **training: Any
    ) -> str:
        training = {
            "steps": STEPS,
            "vae_steps": 3 if training.get("steps", STEPS) > 3 else 0,
            "batch_size": 2,
            "checkpoint_every": EVERY,
            "log_every": 3,
            "device": "cpu",
            **training,
        }
        recipe = {
            "output": output if "://" in output else str(tmp_path / output),
            "sources": sources or [str(source)],
            "clips": {"num_frames": 5, "height": 16, "width": 16, **(clips or {})},
            "model": {"sizes": TINY, **(model or {})},
            "training": training,
        }
        path = tmp_path / "training.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a training, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("clips_per_s", "wait_s")} for line in lines]


@pytest.fixture
def undisturbed(tokenmill: Command, write_training: WriteTraining, tmp_path: Path) -> Path:
    """The output of a training that nothing happened to."""
    assert tokenmill("train", "pyratok", write_training(output="undisturbed")).code == 0
    return tmp_path / "undisturbed"


def test_a_training_writes_a_model_that_tokenizes_and_what_led_to_it(undisturbed: Path, tokenmill: Command) -> None:
    lines = metrics_of(undisturbed)
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 11]
    assert all(line["psnr"] > 0 and line["loss"] > 0 for line in lines)
    assert ["squared_error" in line for line in lines] == [True, False, False, False, False]
    assert all(line["drift"] >= 0 for line in lines[1:])
    file = PyramidFile.read(str(undisturbed / "model.safetensors"))
    assert file.extra["step"] == str(STEPS)
    assert file.statistics is not None
    modes = {(undisturbed / name).stat().st_mode for name in ("model.safetensors", "checkpoint.pt", "metrics.jsonl")}
    assert len(modes) == 1
    tokenizer = load_tokenizer("pyratok/pyramid", str(undisturbed / "model.safetensors"))
    assert tokenizer.spec.codebook_size == 256


def test_a_finished_training_says_so_and_does_nothing(
    undisturbed: Path, tokenmill: Command, write_training: WriteTraining
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    done = tokenmill("train", "pyratok", write_training(output="undisturbed"))
    assert done.code == 0
    assert f"finished model={undisturbed}/model.safetensors steps=12" in done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_more_steps_go_on_where_the_last_training_ended(
    undisturbed: Path, tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    assert tokenmill("train", "pyratok", write_training(output="short", steps=7)).code == 0
    done = tokenmill("train", "pyratok", write_training(output="short"), "--log-json")
    begun = [json.loads(line) for line in done.out.splitlines() if '"training"' in line]
    assert begun[0]["step"] == 7
    assert sha256(tmp_path / "short" / "model.safetensors") == sha256(undisturbed / "model.safetensors")


@pytest.fixture
def start() -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """start(recipe): the command in a process of its own."""
    jobs = []

    def begin(recipe: str) -> "subprocess.Popen[str]":
        code = "from tokenmill.jobs.main import main; main()"
        command = [sys.executable, "-c", code, "train", "pyratok", recipe]
        jobs.append(subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()
        job.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_training_that_was_ended_on_its_way_resumes_to_the_same_bytes(
    undisturbed: Path,
    tokenmill: Command,
    write_training: WriteTraining,
    start: Callable[[str], "subprocess.Popen[str]"],
    source: Path,
    tmp_path: Path,
    number: int,
    code: int,
) -> None:
    out = tmp_path / "out"
    job = start(write_training())
    while job.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.005)
    job.send_signal(number)
    _, said = job.communicate(timeout=120)
    assert job.returncode == code, said
    assert not (out / "model.safetensors").exists()
    kept = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert EVERY <= kept < STEPS
    assert ("stopped; what was committed is kept, the same command resumes" in said) == (number == signal.SIGTERM)
    shutil.copy(source / "a.mp4", source / "new.mp4")
    with open(source / "new.mp4", "ab") as grown:
        grown.write(b"\0" * 8)
    done = tokenmill("train", "pyratok", write_training())
    assert done.code == 0, done.err
    assert f"step={kept}" in done.err
    assert sha256(out / "model.safetensors") == sha256(undisturbed / "model.safetensors")
    assert metrics_of(out) == metrics_of(undisturbed)
    assert not list(out.glob(".staging/*"))


def test_a_broken_video_is_named_and_left_out(
    tokenmill: Command, write_training: WriteTraining, source: Path, unreadable: dict[str, str]
) -> None:
    shutil.copy(unreadable["garbage"], source / "broken.mp4")
    done = tokenmill("train", "pyratok", write_training(steps=1))
    assert done.code == 0
    assert re.search(r"failed video=\S*broken\.mp4 reason=", done.err)
    assert "training clips=12 " in done.err


def test_clips_that_can_no_longer_be_decoded_are_named_and_others_stand_for_them(
    tokenmill: Command, write_training: WriteTraining, source: Path, tmp_path: Path
) -> None:
    recipe = write_training(steps=1)
    assert tokenmill("train", "pyratok", recipe).code == 0
    shutil.copy(source / "b.mp4", source / "a.mp4")
    done = tokenmill("train", "pyratok", recipe, "--set", "training.steps=12")
    assert done.code == 0
    assert len(re.findall(r'failed clip=\w+ step=decode reason="the file has changed since it was', done.err)) == 5
    for name in ("a", "b", "c"):
        (source / f"{name}.mp4").unlink()
    done = tokenmill("train", "pyratok", recipe, "--set", "training.steps=14")
    assert done.code == 1
    assert "none of the 12 clips can be decoded, the first because of: " in done.err
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 12


def test_captions_reach_a_model_that_takes_text(
    tokenmill: Command, write_training: WriteTraining, videos: Path, tmp_path: Path
) -> None:
    made = {}
    for words in ("a red ball", "a blue ball", None):
        with open(tmp_path / "videos.csv", "w", newline="") as table:
            csv.writer(table).writerows([("uri", "caption"), *((videos / f"{n}.mp4", words) for n in "abc")])
        source = {"kind": "table", "path": str(tmp_path / "videos.csv")}
        recipe = write_training(
            sources=[source], model={"text_width": 8}, steps=2, caption_share=1, output=f"out_{words}"
        )
        assert tokenmill("train", "pyratok", recipe).code == 0
        tensors = PyramidFile.read(str(tmp_path / f"out_{words}" / "model.safetensors")).tensors
        made[words] = tensors["pyramid.words.table.weight"]
    assert not torch.equal(made["a red ball"], made["a blue ball"])
    assert not torch.equal(made["a red ball"], made[None])


def test_a_training_begins_with_the_vae_that_it_is_given(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    vae = build_release(VaeSizes(**TINY))
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    model = {"vae": str(tmp_path / "vae.pt"), "sizes": None}
    recipe = write_training(model=model, steps=1, learning_rate=1e-9, weight_decay=0)
    assert tokenmill("train", "pyratok", recipe).code == 0
    file = PyramidFile.read(str(tmp_path / "out" / "model.safetensors"))
    assert file.sizes == vae.sizes
    for name, value in vae.state_dict().items():
        if not name.startswith("lapq_"):
            torch.testing.assert_close(file.tensors[name], value, atol=1e-7, rtol=0)


def test_what_decides_the_weights_may_not_change_once_steps_are_kept(
    tokenmill: Command, write_training: WriteTraining
) -> None:
    assert tokenmill("train", "pyratok", write_training(steps=1)).code == 0
    changed = write_training(steps=2, seed=3, model={"normalized": False})
    done = tokenmill("train", "pyratok", changed, "--set", "training.log_every=2")
    assert done.code == 1
    assert (
        "out: this training was begun by another recipe, with model.normalized=True (this recipe: False),"
        " training.seed=0 (this recipe: 3): give output: another folder, or set the values back"
    ) in done.err


def test_a_recipe_that_has_made_no_step_may_change(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    assert tokenmill("train", "pyratok", write_training(steps=1)).code == 0
    for name in ("checkpoint.pt", "model.safetensors"):  # as if it had been killed in its first step
        (tmp_path / "out" / name).unlink()
    done = tokenmill("train", "pyratok", write_training(steps=1, clips={"num_frames": 3}))
    assert done.code == 0
    assert "training clips=21 " in done.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"output": "s3://bucket/out"}, 2, "output: found 's3://bucket/out'; accepted: a local folder, to copy from"),
        ({"clips": {"num_frames": 8}}, 2, "clips.num_frames: found 8; accepted: 1 + 2k for this VAE, such as 9"),
        ({"clips": {"width": 18}}, 2, "clips.width: found 18; accepted: multiples of 4 for this VAE"),
        ({"model": {"sizes": {"dim_mult": [1, 1]}}}, 2, "model: sizes from 1 on, and temperal_downsample one shorter"),
        ({"model": {"vae": "no.pt", "sizes": None}}, 2, "model: weights no.pt: it does not exist: check the path"),
        ({"device": "cuda:99"}, 2, "training.device: device 'cuda:99' was asked for, torch finds"),
        ({"sources": ["nowhere/"]}, 1, "nowhere"),
        ({"stps": 1}, 2, "training.stps: unknown key (did you mean 'steps'?)"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tokenmill: Command, write_training: WriteTraining, change: dict[str, Any], code: int, message: str
) -> None:
    done = tokenmill("train", "pyratok", write_training(**change))
    assert (done.code, message in done.err) == (code, True), done.err
    assert "Traceback" not in done.err


def test_another_model_is_refused(tokenmill: Command, write_training: WriteTraining) -> None:
    done = tokenmill("train", "vidtok", write_training())
    assert done.code == 2
    assert "'vidtok' is not one of 'pyratok'" in done.err


def test_a_folder_of_something_else_is_refused(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = tokenmill("train", "pyratok", write_training())
    assert done.code == 1
    assert "out: not empty (notes.txt is there) and no output of a training: give an empty or new folder" in done.err


def test_two_trainings_in_one_folder_are_refused(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = tokenmill("train", "pyratok", write_training())
    assert done.code == 1
    assert "out: another process trains there: wait for it, or give another output" in done.err


def test_fewer_steps_than_were_done_are_refused(tokenmill: Command, write_training: WriteTraining) -> None:
    assert tokenmill("train", "pyratok", write_training(steps=2)).code == 0
    done = tokenmill("train", "pyratok", write_training(steps=1))
    assert (done.code, "training.steps: found 1; accepted: 2, done already, or more" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoint.pt", "checkpoint.pt: damaged (.*): remove it to begin anew"),
        ("training.json", "training.json: damaged (.*): give output: another folder"),
    ],
)
def test_damaged_files_of_an_output_are_named(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path, name: str, message: str
) -> None:
    assert tokenmill("train", "pyratok", write_training(steps=1)).code == 0
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:100])
    done = tokenmill("train", "pyratok", write_training(steps=2))
    assert done.code == 1
    assert re.search(message, done.err)


def test_a_checkpoint_of_another_version_is_refused(
    tokenmill: Command, write_training: WriteTraining, tmp_path: Path
) -> None:
    assert tokenmill("train", "pyratok", write_training(steps=1)).code == 0
    path = tmp_path / "out" / "checkpoint.pt"
    kept = torch.load(path, weights_only=True)
    kept["training"]["model.more"] = torch.zeros(1)
    torch.save(kept, path)
    done = tokenmill("train", "pyratok", write_training(steps=2))
    assert done.code == 1
    assert re.search(
        r"checkpoint.pt: of another version of tokenmill \(.*model\.more.*\): go on with that one", done.err
    )


def test_a_model_that_was_lost_or_torn_is_written_again(
    undisturbed: Path, tokenmill: Command, write_training: WriteTraining
) -> None:
    path = undisturbed / "model.safetensors"
    before = sha256(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert tokenmill("train", "pyratok", write_training(output="undisturbed")).code == 0
    assert sha256(path) == before
    path.unlink()
    assert tokenmill("train", "pyratok", write_training(output="undisturbed")).code == 0
    assert sha256(path) == before


def test_metrics_from_a_step_on_and_what_a_kill_has_torn_are_cut(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for step in (0, 10, 20):
        add_metrics(folder, {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3')
    cut_metrics(folder, 20)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 10}\n'


def test_the_learning_rate_rises_and_stays_or_falls_as_a_cosine() -> None:
    section = LearningSection(steps=104, warmup_steps=4, learning_rate=1.0)
    assert [learning_rate_at(step, section) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate_at(103, section) == 1.0
    cosine = section.model_copy(update={"schedule": "cosine"})
    assert [learning_rate_at(step, cosine) for step in (3, 4, 54, 104)] == pytest.approx([0.8, 1.0, 0.5, 0.0])
    after_the_vae = [learning_rate_at(step, section, 50) for step in (0, 49, 50, 54, 90)]
    assert after_the_vae == pytest.approx([0.2 * section.vae_learning_rate, section.vae_learning_rate, 0.2, 1.0, 1.0])


def test_a_loss_that_is_no_number_ends_the_training_and_says_what_to_change() -> None:
    training = PyramidTraining(build_pyramid(VaeSizes(**TINY), PyramidSizes(text_width=None)))
    learner = Learner(training=training, section=LearningSection(steps=1))
    frames_BCTHW = torch.full((1, 3, 5, 16, 16), torch.nan)
    before = {name: value.clone() for name, value in training.state_dict().items()}
    with pytest.raises(TokenizerError, match=r"step 0: the loss is nan and .*: give a smaller training\.learning_rate"):
        learner.update(frames_BCTHW, [None])
    assert learner.step == 0
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
