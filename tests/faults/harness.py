"""A job that is hurt at random and run again until it is complete, and the comparison with one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import yaml
from processes import of_kind

from tokenmill.jobs.collect import collect_garbage
from tokenmill.jobs.verify import verify_cache

MASKS = {"objects": {"segmenter": "fake"}}
POISON = str(Path(__file__).parent / "poison")
COMPLETE = (0, 3)
COMMAND = "from tokenmill.jobs.main import main; main()"
PATIENCE_S = 600


@dataclass(slots=True, kw_only=True)
class Job:
    """A recipe in a folder of its own; `counts` says what has been done to it."""

    folder: Path
    cache: str
    recipe: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def begin(self) -> "subprocess.Popen[bytes]":
        """The job, in a process of its own; what it says is added to log.txt."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe | {"cache": self.cache}))
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, "run", str(path)],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def finish(self, most_runs: int = 5) -> int:
        """Run until it is complete; returns the exit code. AssertionError after `most_runs`."""
        for _ in range(most_runs):
            code = self.begin().wait(PATIENCE_S)
            if code in COMPLETE:
                return code
        raise AssertionError(f"not complete after {most_runs} runs:\n{self.said()[-3000:]}")

    def kill_drivers(self, num_kills: int, chance: random.Random, numbers: Sequence[int] = (signal.SIGKILL,)) -> None:
        """Kill the driver so often, each time at a random moment of a run that would have gone on."""
        most_s = 8.0
        while self.counts.get("driver kills", 0) < num_kills:
            driver = self.begin()
            try:
                driver.wait(chance.uniform(0.2, most_s))
            except subprocess.TimeoutExpired:
                driver.send_signal(chance.choice(numbers))
                driver.wait(PATIENCE_S)
                self._count("driver kills")
            else:  # it came to its end
                return

    def kill_workers(self, kinds: Sequence[str], most_kills: int, chance: random.Random, every_s: float) -> int:
        """Kill a random process of these kinds now and then while the job runs; its exit code."""
        driver, kills = self.begin(), 0
        while driver.poll() is None and kills < most_kills:
            time.sleep(chance.uniform(0.2, 2 * every_s))
            victims = of_kind(chance.choice(kinds), driver.pid)
            if victims:
                kills += 1
                self._count(f"{kill(chance.choice(victims).pid) or 'missed'} kills")
        return driver.wait(PATIENCE_S)

    def said(self) -> str:
        """All that its runs have said."""
        return (self.folder / "log.txt").read_text()

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def kill(pid: int) -> str:
    """Kill one process: "worker", or "" where it had just ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that must be the same in two caches of one recipe: files are named by what is in them."""

    data_files: frozenset[str]
    clip_ids: tuple[str, ...]
    failures: frozenset[tuple[str, str, str, str]]


def contents_of(cache: str) -> Contents:
    """What is in a cache, read from its files alone; AssertionError where a file is torn or a manifest lies."""
    filesystem, root = fsspec.core.url_to_fs(cache)
    filesystem.invalidate_cache()
    names = [str(path)[len(root) + 1 :] for path in filesystem.find(root)]
    data = {name for name in names if name.split("/")[0] in ("clips", "masks", "tokens", "webdataset")}
    named: set[str] = set()
    failures, clip_ids = set(), []
    for name in names:
        if name.startswith("manifests/") and name.endswith(".json"):
            manifest = json.loads(filesystem.cat_file(f"{root}/{name}"))
            named |= {file["name"] for file in manifest["files"]}
            for failure in manifest["failures"]:
                failures.add((manifest["product"], failure["clip_id"], failure["status"], failure["reason"]))
    for name in sorted(named):
        if name.endswith(".parquet"):
            with filesystem.open(f"{root}/{name}", "rb") as stream:
                rows = pq.read_table(stream)  # a torn file cannot be read
            if name.startswith("clips/"):
                clip_ids += rows["clip_id"].to_pylist()
    assert named <= data, f"named and absent: {sorted(named - data)}"
    return Contents(data_files=frozenset(data), clip_ids=tuple(sorted(clip_ids)), failures=frozenset(failures))


def asked_of(job: Job, whole: Contents) -> Contents:
    """Of a job with masks, what a job that may be without is to make."""
    files = {name for name in whole.data_files if not name.startswith("masks/") or "masks" in job.recipe}
    return replace(whole, data_files=frozenset(files))


def assert_same(hurt: Job, whole: Contents) -> None:
    """The hurt job's cache holds what an undisturbed one does: nothing lost, twice, torn or left over."""
    collect_garbage(hurt.cache, "0s", delete=True, old_versions=False)
    found = contents_of(hurt.cache)
    assert len(set(found.clip_ids)) == len(found.clip_ids), "a clip was committed twice"
    assert found.clip_ids == whole.clip_ids
    assert found.failures == whole.failures
    assert found.data_files == asked_of(hurt, whole).data_files
    assert verify_cache(hurt.cache, deep=True, retokenize=None) == []
    if "://" not in hurt.cache:
        left = [path for path in Path(hurt.cache).rglob("*") if path.name.startswith(".")]
        assert not left, left


def make_videos(folder: Path, template: str, num_videos: int) -> None:
    """Copies of a video that are not the same file: each ends in a free box of its own."""
    folder.mkdir(parents=True)
    for i in range(num_videos):
        box = (16).to_bytes(4, "big") + b"free" + f"{i:08d}".encode()
        (folder / f"{i:03d}.mp4").write_bytes(Path(template).read_bytes() + box)


MakeJob = Callable[..., Job]
