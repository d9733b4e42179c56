"""Videos in which one thing is shown at known times, and caches of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from tokenmill.jobs.display import showing
from tokenmill.jobs.recipes import load_recipe
from tokenmill.jobs.run import run_recipe
from tokenmill.pipeline.render import write_video

FPS = 4
SIDE = 64
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


def planted_video(path: Path, num_frames: int, shown: dict[str, list[range]], seed: int) -> None:
    """A grey, noisy video that is filled by a colour in some ranges of frames."""
    rng = np.random.default_rng(seed)
    frames_THWC = rng.integers(90, 120, (num_frames, SIDE, SIDE, 1), np.uint8).repeat(3, axis=3)
    for colour, spans in shown.items():
        for span in spans:
            frames_THWC[span.start : span.stop, 8:, 8:] = COLOURS[colour]
    write_video(str(path), frames_THWC, FPS)


def planted_recipe(folder: Path, sections: dict, videos: Callable[[Path], None]) -> str:
    """Writes the videos, and a recipe of clips of four seconds with every frame a candidate."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    videos(folder / "videos")
    recipe = {
        "cache": str(folder / "cache"),
        "sources": [str(folder / "videos")],
        "clips": {"num_frames": 16, "height": SIDE, "width": SIDE},
        "tokens": {"dct": {"tokenizer": "dct_fsq/488_262144"}},
        "frames": {"fps": "all", "encoders": {"colours": {"encoder": "fake"}}},
        "shards": {"frames": 512},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | sections))
    return str(path)


def make(recipe: str, *overrides: str) -> None:
    """Run a recipe."""
    with showing(log_json=True) as display:
        assert run_recipe(load_recipe(recipe, list(overrides)), display).exit_code == 0
