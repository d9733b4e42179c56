"""What a training learns of moving shapes with captions, from random weights, on a CPU in minutes."""

import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from tokenmill.tokenizers.pyratok_losses import LossWeights, PyramidTraining
from tokenmill.tokenizers.pyratok_pyramid import Pyramid, PyramidFile, PyramidSizes, build_pyramid
from tokenmill.tokenizers.pyratok_quantizer import signs_of
from tokenmill.tokenizers.pyratok_vae import VaeSizes, draw_weights

pytestmark = pytest.mark.slow

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230), "yellow": (230, 220, 50)}
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
GROUNDS = {"black": 20, "white": 235}
SHAPES = ("square", "disc")
NUM_FRAMES, SIDE = 5, 32
SIZES = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def shape_THWC(colour: str, shape: str, move: str, ground: str, start: np.ndarray) -> np.ndarray:
    """Frames of a shape with soft borders that goes round."""
    places = np.arange(SIDE)
    frames = []
    for t in range(NUM_FRAMES):
        y, x = (
            np.abs((places - (s + t * d) + SIDE / 2) % SIDE - SIDE / 2) for s, d in zip(start, MOVES[move], strict=True)
        )
        far_HW = 0.88 * np.hypot(y[:, None], x) if shape == "disc" else np.maximum(y[:, None], x)
        share_HW1 = 1 / (1 + np.exp((far_HW - 0.38 * SIDE) / (0.1 * SIDE)))[..., None]
        frames.append(share_HW1 * np.array(COLOURS[colour]) + (1 - share_HW1) * GROUNDS[ground])
    return np.stack(frames).astype(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A table of videos with captions, and the same in memory."""

    table: Path
    x_BCTHW: torch.Tensor
    captions: tuple[str, ...]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """64 videos."""
    folder, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    rows, clips = [("uri", "caption")], []
    for number, (colour, shape, move, ground) in enumerate(itertools.product(COLOURS, SHAPES, MOVES, GROUNDS)):
        clips.append(shape_THWC(colour, shape, move, ground, draw.integers(0, SIDE, 2)))
        rows.append((f"{number:02}.mp4", f"a {colour} {shape} moves {move} over {ground}"))
        with av.open(f"{folder}/{rows[-1][0]}", "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "8"})
            stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv444p"
            for image in clips[-1]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    with open(folder / "videos.csv", "w", newline="") as table:
        csv.writer(table).writerows(rows)
    x_BCTHW = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()
    return Data(table=folder / "videos.csv", x_BCTHW=x_BCTHW, captions=tuple(caption for _, caption in rows[1:]))


def train(data: Data, output: Path) -> Path:
    """The output of a training from random weights, with the weights of terms of the paper."""
    recipe = {
        "output": str(output),
        "sources": [{"kind": "table", "path": str(data.table)}],
        "clips": {"num_frames": NUM_FRAMES, "height": SIDE, "width": SIDE},
        "model": {"sizes": SIZES, "text_width": 32},
        "training": {"steps": 300, "vae_steps": 150, "batch_size": 8, "device": "cpu", "log_every": 50},
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = "from tokenmill.jobs.main import main; main()"
    subprocess.run([sys.executable, "-c", code, "train", "pyratok", str(path)], check=True)
    return output


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data, tmp_path_factory.mktemp("trained") / "out")


def model_of(output: Path) -> Pyramid:
    return PyramidFile.read(str(output / "model.safetensors")).build()


def psnr(model: Pyramid, data: Data, num_levels: int) -> float:
    """Of the first levels, in dB, over all videos, without captions."""
    with torch.inference_mode():
        ids = [level.ids_Bthw for level in model.encode_levels(data.x_BCTHW)[:num_levels]]
        error = F.mse_loss(model.decode_levels(ids), data.x_BCTHW.float() / 127.5 - 1)
    return float(10 * torch.log10(4 / error))


def test_a_training_makes_the_videos_better_by_three_decibels(data: Data, trained: Path) -> None:
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    figures = first["psnr"], psnr(model_of(trained), data, 4)
    print(f"psnr before and after: {figures}")
    assert first["step"] == 0
    assert figures[1] > figures[0] + 3


def test_most_bits_of_every_level_are_of_use(data: Data, trained: Path) -> None:
    with torch.inference_mode():
        levels = model_of(trained).encode_levels(data.x_BCTHW)
    for level in levels:
        share_C = (signs_of(level.ids_Bthw, 16) > 0).double().flatten(0, 3).mean(0).clamp(1e-9, 1 - 1e-9)
        entropy_C = -(share_C * share_C.log2() + (1 - share_C) * (1 - share_C).log2())
        print(f"bits above 0.5: {int((entropy_C > 0.5).sum())}, entropy: {entropy_C.mean():.2f}")
        assert (entropy_C > 0.5).sum() >= 12


def test_ids_are_foretold_better_from_their_captions_than_from_others(data: Data, trained: Path) -> None:
    training = PyramidTraining(model_of(trained))
    training.load_state_dict(torch.load(trained / "checkpoint.pt", weights_only=True)["training"])

    def loss(captions: Sequence[str]) -> float:
        drawn = [torch.Generator().manual_seed(seed) for seed in range(4)]
        with torch.inference_mode():
            return float(np.mean([training(data.x_BCTHW, captions, one)["autoregression"].item() for one in drawn]))

    others = [loss([data.captions[i] for i in np.random.default_rng(seed).permutation(64)]) for seed in range(4)]
    figures = loss(data.captions), float(np.mean(others))
    print(f"autoregression with true and with other captions: {figures}")
    assert figures[0] < 0.98 * figures[1]


def test_every_level_that_is_left_out_costs_quality(data: Data, trained: Path) -> None:
    figures = [psnr(model_of(trained), data, number) for number in (1, 2, 3, 4)]
    print(f"psnr by levels: {figures}")
    assert figures == sorted(figures)


def test_four_levels_are_better_than_one_at_equal_steps(data: Data) -> None:
    """Of latents of four channels, so that bits are dear, and without captions; the deepest level is the one."""
    torch.set_num_threads(1)
    sizes, weights = VaeSizes(**SIZES | {"z_dim": 4}), LossWeights(codebook=0.25, autoregression=0, drift=0)
    vae, figures = None, []
    for num_levels in (None, 1):
        torch.manual_seed(0)
        model = build_pyramid(sizes, PyramidSizes(text_width=None, num_levels=num_levels))
        training = PyramidTraining(model, weights)
        if vae is None:
            draw_weights(model, 0)
            steps(training.vae_loss, training, data, 300, learning_rate=3e-3)
            vae = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("pyramid.")}
        model.load_state_dict(vae, strict=False)
        training.begin_levels(list(data.x_BCTHW.split(1)), normalized=True)
        steps(lambda x_BCTHW, of=training: of.total(of(x_BCTHW)), training, data, 120, learning_rate=1e-3)
        figures.append(psnr(model, data, 4))
    print(f"psnr of four levels and of one: {figures}")
    assert figures[0] > figures[1]


def steps(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    training: PyramidTraining,
    data: Data,
    count: int,
    *,
    learning_rate: float,
) -> None:
    """Train with batches of eight in a drawn order."""
    optimizer = torch.optim.AdamW([one for one in training.parameters() if one.requires_grad], learning_rate)
    drawn = torch.Generator().manual_seed(0)
    for _ in range(count):
        loss = loss_of(data.x_BCTHW[torch.randperm(len(data.x_BCTHW), generator=drawn)[:8]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.parameters(), 4.0)
        optimizer.step()
