"""The examples, run as a user runs them: each makes or reads a cache of real clips, and its loss falls."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def started(*command: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def output_of(*command: str) -> str:
    with started(*command) as process:
        out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def example(name: str, *arguments: Path) -> tuple[str, ...]:
    return sys.executable, f"examples/{name}.py", *map(str, arguments)


def assert_loss_fell(out: str, to_share: float) -> None:
    losses = re.search(r"first loss (\S+), last loss (\S+)", out)
    assert losses, out
    assert float(losses[2]) < to_share * float(losses[1]), out


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "demo"
    command = f"{Path(sys.executable).parent}/tokenmill"
    settings = (f"cache={cache}", "masks={}", "frames=null")  # codes alone are learned from
    output_of(command, "run", "examples/demo.yaml", *(word for one in settings for word in ("--set", one)))
    return cache


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "training"
    assert "The weights are random" in output_of(*example("make_training_cache", cache))
    return cache


def test_a_transformer_learns_codes(demo: Path) -> None:
    assert_loss_fell(output_of(*example("train_autoregressive", demo)), 0.7)


def test_a_killed_training_goes_on_where_it_was(demo: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    with started(*example("train_autoregressive", demo, checkpoint)) as process:
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    out = output_of(*example("train_autoregressive", demo, checkpoint))
    assert re.search(r"resumed after [0-9]*0 steps", out)
    assert_loss_fell(out, 0.7)


def test_a_denoiser_learns_latents(training: Path) -> None:
    assert_loss_fell(output_of(*example("train_diffusion", training)), 0.7)


def test_a_classifier_learns_tokens_of_trajectories(training: Path) -> None:
    out = output_of(*example("train_classifier", training))
    assert_loss_fell(out, 0.3)
    right = re.search(r"held out (\d+)% are right", out)
    assert right, out
    assert int(right[1]) > 70
