"""The harness and its parts are imported by name; and the job that is hurt."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "poison")]

from harness import MASKS, Contents, Job, MakeJob, contents_of, make_videos  # noqa: E402


@pytest.fixture(scope="session")
def videos(make_video: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty videos of 75 frames."""
    folder = tmp_path_factory.mktemp("faults") / "videos"
    make_videos(folder, make_video(num_frames=75, width=128, height=128), 40)
    return folder


@pytest.fixture(scope="session")
def make_job(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """make_job(cache=None, kind="local", ...): a job over those videos, in a folder of its own."""
    numbers = itertools.count()

    def make(cache: str | None = None, sources: Path = videos, **sections: Any) -> Job:
        folder = tmp_path_factory.mktemp(f"job{next(numbers)}")
        recipe = {
            "sources": [str(sources)],
            "clips": {"num_frames": 8, "height": 96, "width": 96},
            "tokens": {"dct": {"tokenizer": "dct_fsq/488_262144", "batch_size": 4}},
            "shards": {"frames": 150},
        }
        return Job(folder=folder, cache=cache or f"{folder}/cache", recipe=recipe | sections)

    return make


@pytest.fixture(scope="session")
def whole(make_job: MakeJob) -> Contents:
    """What the job makes, with masks, when it is left alone."""
    job = make_job(masks=MASKS)
    assert job.finish(most_runs=1) == 0
    found = contents_of(job.cache)
    assert len(found.clip_ids) == 40 * 10
    return found
