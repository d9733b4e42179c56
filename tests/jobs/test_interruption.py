"""Being asked to stop: the shard in hand is finished or left, never lost, and every way has its exit code."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmill.jobs import interruption
from tokenmill.jobs.interruption import draining, exit_code, heed_interrupts, raise_if_interrupted

# A shell that runs the tests in the background has SIGINT ignored, and processes inherit that.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from tokenmill.jobs.main import main; main()"
)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers of the tests, put back at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_that_was_swallowed_is_raised_again() -> None:
    heed_interrupts()
    raise_if_interrupted()
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        raise_if_interrupted()
    heed_interrupts()
    raise_if_interrupted()


@pytest.mark.usefixtures("handlers")
def test_where_interrupts_are_ignored_they_stay_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heed_interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    raise_if_interrupted()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: int) -> None:
    heed_interrupts()
    with draining(60) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert (stop.is_set(), exit_code()) == (True, 75)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert exit_code() == 130


@pytest.mark.usefixtures("handlers")
def test_the_time_for_finishing_has_an_end() -> None:
    heed_interrupts()
    with draining(0.05) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
    assert exit_code() == 75


@pytest.fixture
def start(write_recipe: Callable[..., str], footage: Path, tmp_path: Path) -> Iterator[Start]:
    """start("--set", ...): a job of 16 shards in a process of its own."""
    recipe = write_recipe([footage / "bigbuckbunny.mp4"], shards={"frames": 8})
    jobs = []

    def begin(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", COMMAND, "run", recipe, "--log-json", *options]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
        jobs.append(subprocess.Popen(command, text=True, **pipes))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()
        job.communicate()


def wait_for_manifests(job: "subprocess.Popen[str]", cache: Path, at_least: int) -> None:
    while job.poll() is None and len(list(cache.glob("manifests/tokens/fake/*.json"))) < at_least:
        time.sleep(0.01)


def wait_for_event(job: "subprocess.Popen[str]", name: str) -> None:
    assert job.stdout is not None
    assert any(json.loads(line)["event"] == name for line in job.stdout)


@pytest.mark.parametrize(
    ("executor", "number"),
    [
        pytest.param("local", signal.SIGINT, marks=pytest.mark.slow),
        ("local", signal.SIGTERM),
        pytest.param("ray", signal.SIGTERM, marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param("ray", signal.SIGINT, marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_a_job_that_is_asked_to_stop_finishes_its_shard_and_says_how_to_resume(
    start: Start, tmp_path: Path, executor: str, number: int
) -> None:
    job = start("--executor", executor)
    wait_for_manifests(job, tmp_path / "cache", 2)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 75, said
    assert "what is running has 60 s to finish; once more stops at once" in said
    assert "stopped; what was committed is kept, the same command resumes" in said
    counts = [len(list((tmp_path / "cache" / "manifests" / p).glob("*.json"))) for p in ("clips", "tokens/fake")]
    assert counts[0] == counts[1] < 16
    assert not list((tmp_path / "cache").glob(".staging/*"))


def test_a_job_that_is_asked_twice_stops_at_once(start: Start, tmp_path: Path) -> None:
    job = start("--set", "executor.kind=local")
    wait_for_manifests(job, tmp_path / "cache", 1)
    os.kill(job.pid, signal.SIGSTOP)  # both signals are there when it goes on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(job.pid, number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "interrupted; what was committed is kept, the same command resumes" in said


def test_an_interrupt_that_a_library_made_an_error_of_is_still_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interruption, "_interrupted", threading.Event())
    with pytest.raises(ValueError, match="of the job"), interruption.resumable():
        raise ValueError("of the job")
    interruption._interrupted.set()
    with pytest.raises(SystemExit) as ended, interruption.resumable():
        raise RuntimeError("what the library said")
    assert ended.value.code in (interruption.STOPPED, interruption.INTERRUPTED)
    assert "what was committed is kept" in capsys.readouterr().err


@pytest.mark.slow
def test_without_grace_the_shard_in_hand_is_left(start: Start, tmp_path: Path) -> None:
    job = start("--set", "executor.grace_s=0")
    wait_for_manifests(job, tmp_path / "cache", 1)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 75


def test_a_job_that_is_stopped_while_it_plans_ends_at_once(start: Start) -> None:
    job = start()
    wait_for_event(job, "sources")
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, "the same command resumes" in said) == (75, True), said
