"""Work in a child process: values come back whole, and every way of dying has a reason."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmill.pipeline.isolation import OUTSIDE_STRIKES, Child, ChildDied, Poison, stream_with_strikes
from tokenmill.pipeline.retries import retry_counts
from tokenmill.pipeline.zygote import zygote
from tokenmill.schemas.errors import DecodeError, TokenmillError

JOBS = """
import ctypes, os, signal, sys, time
import numpy as np
from tokenmill.pipeline.retries import RetryPolicy, with_retries
from tokenmill.schemas.errors import DecodeError

def make(prefix):
    if prefix == "cannot":
        raise OSError("no such library")
    def run(job):
        what, value = job
        yield prefix
        if what == "count":
            yield from range(value)
        elif what == "arrays":
            yield {"frames": np.arange(value, dtype=np.uint8), "empty": np.empty(0)}
        elif what == "pid":
            yield os.getpid()
        elif what == "segfault":
            print("the last words", file=sys.stderr, flush=True)
            ctypes.string_at(0)
        elif what == "exit":
            os._exit(7)
        elif what == "hang":
            ctypes.PyDLL(None).sleep(3600)
        elif what == "eat":
            held = bytearray(os.urandom(1 << 20)) * 1200
            time.sleep(3600)
        elif what == "leak":
            globals().setdefault("leaked", []).append(bytearray(os.urandom(1 << 20)) * value)
        elif what == "refuse":
            raise DecodeError("a known error")
        elif what == "bug":
            raise KeyError("a bug")
        elif what == "ask":
            answers = iter([TimeoutError("slow"), TimeoutError("slow"), None])
            def ask():
                if error := next(answers):
                    raise error
            with_retries(ask, "a store", RetryPolicy(first_wait_s=0))
            if value == "refused":
                raise DecodeError("a known error")
        elif what == "large":
            for _ in range(value):
                yield np.ones(1 << 20, np.uint8)
    return run
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    (tmp_path / "isolated_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import isolated_jobs  # pyright: ignore[reportMissingImports]

    made = Child(partial(isolated_jobs.make, "served"), memory_mb=1000)
    yield made
    made.close()
    del sys.modules["isolated_jobs"]


def values_of(child: Child, what: str, value: Any = None) -> list[Any]:
    return list(child.stream((what, value)))


def pid_of(child: Child) -> int:
    return values_of(child, "pid")[1]


def test_values_come_back_in_order_from_one_process(child: Child) -> None:
    assert values_of(child, "count", 1000) == ["served", *range(1000)]
    assert pid_of(child) == pid_of(child) != os.getpid()


def test_arrays_come_back_whole(child: Child) -> None:
    _, found = values_of(child, "arrays", 3_000_000)
    assert np.array_equal(found["frames"], np.arange(3_000_000, dtype=np.uint8))
    assert found["empty"].size == 0


@pytest.mark.parametrize(
    ("what", "reason"), [("segfault", "signal: died of SIGSEGV"), ("exit", "exit: ended with code 7")]
)
def test_a_death_says_how(child: Child, what: str, reason: str) -> None:
    with pytest.raises(ChildDied) as died:
        values_of(child, what)
    assert died.value.reason == reason
    assert not died.value.outside
    assert values_of(child, "count", 2) == ["served", 0, 1]


def test_a_death_keeps_the_end_of_what_was_said(child: Child) -> None:
    values_of(child, "count", 1)
    with pytest.raises(ChildDied) as died:
        values_of(child, "segfault")
    assert "the last words" in died.value.log_tail
    assert "Fatal Python error: Segmentation fault" in died.value.log_tail


def test_a_child_that_hangs_is_killed_after_its_time(child: Child) -> None:
    stream = child.stream(("hang", None))
    assert next(stream) == "served"
    child.allow_s(0.5)
    with pytest.raises(ChildDied, match="time-out"):
        next(stream)


def test_a_child_that_eats_memory_is_killed(child: Child) -> None:
    with pytest.raises(ChildDied, match="memory: killed with more than 1000 MB"):
        values_of(child, "eat")


def test_a_child_that_leaks_is_replaced_between_two_jobs(child: Child) -> None:
    first = pid_of(child)
    values_of(child, "leak", 10)
    assert pid_of(child) == first
    values_of(child, "leak", 600)
    assert pid_of(child) != first


def test_errors_of_a_user_are_raised_here_and_bugs_are_deaths(child: Child) -> None:
    with pytest.raises(DecodeError, match="a known error"):
        values_of(child, "refuse")
    with pytest.raises(ChildDied, match="the decoder raised KeyError: 'a bug'") as died:
        values_of(child, "bug")
    assert "Traceback" in died.value.log_tail


def test_a_child_that_cannot_begin_is_no_poison(child: Child) -> None:
    import isolated_jobs  # pyright: ignore[reportMissingImports]

    other = Child(partial(isolated_jobs.make, "cannot"), memory_mb=1000)
    with pytest.raises(TokenmillError, match=r"a decoder process could not start .*no such library"):
        list(stream_with_strikes(other, "a", lambda: ("count", 1)))


def test_two_deaths_of_its_own_make_poison(child: Child) -> None:
    asked = []
    with pytest.raises(Poison) as poison:
        list(stream_with_strikes(child, "a", lambda: asked.append(1) or ("segfault", None)))
    assert (len(asked), poison.value.attempts, poison.value.reason) == (2, 2, "signal: died of SIGSEGV")


def test_being_killed_by_somebody_else_is_forgiven_more_often(child: Child) -> None:
    num_kills = 0

    def kill_at_each_value() -> None:
        nonlocal num_kills
        for _ in stream_with_strikes(child, "a", lambda: ("hang", None)):
            assert child._process is not None
            os.kill(child._process.pid, signal.SIGKILL)
            num_kills += 1

    with pytest.raises(Poison, match=r"SIGKILL \(by hand, or by a system short of memory\)"):
        kill_at_each_value()
    assert num_kills == OUTSIDE_STRIKES


def test_a_stream_that_is_left_early_does_not_reach_the_next_job(child: Child) -> None:
    stream = child.stream(("count", 10**9))
    assert [next(stream), next(stream)] == ["served", 0]
    stream.close()
    assert values_of(child, "count", 1) == ["served", 0]


def test_closing_wakes_the_thread_that_waits(child: Child) -> None:
    found: list[BaseException] = []

    def wait() -> None:
        try:
            values_of(child, "hang")
        except ChildDied as died:
            found.append(died)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while child._process is None or not child._is_awaited:
        time.sleep(0.01)
    child.close()
    waiting.join(30)
    assert [str(died) for died in found] == ["closed"]


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "isolated_jobs.py").write_text(JOBS)
    code = (
        "import time; from functools import partial; from isolated_jobs import make\n"
        "from tokenmill.pipeline.isolation import Child\n"
        "child = Child(partial(make, ''), 300); print(list(child.stream(('pid', 0)))[1], flush=True)\n"
        "list(child.stream(('hang', 0)))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def test_requests_that_the_child_made_again_are_counted_here(child: Child) -> None:
    before = retry_counts()
    values_of(child, "ask")
    assert retry_counts() - before == {"timeout": 2}
    with pytest.raises(DecodeError):
        values_of(child, "ask", "refused")
    assert retry_counts() - before == {"timeout": 4}


def test_children_are_forked_again_where_their_zygote_was_killed(child: Child) -> None:
    stream = child.stream(("hang", None))
    assert next(stream) == "served"
    os.kill(zygote()._process.pid, signal.SIGKILL)
    with pytest.raises(ChildDied) as died:
        next(stream)
    assert died.value.outside
    assert values_of(child, "count", 1) == ["served", 0]
