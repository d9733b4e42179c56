"""Prints how well and how fast slic3d finds the shapes of synthetic clips, beside a plain rendering of its method.

    python benchmarks/segmenters.py [--seeds 10]

Clips are 16x224x224: five textured shapes that move over a background that pans. clean: by up to 3 % of the side in a
frame, over smooth waves; noisy: the same over random texture, with noise of 8 grey levels; fast: as noisy, 3 times as
fast. tube IoU is the mean over the shapes and the background of the IoU over all frames with the track matched to each;
it is given for tracks as they come, and as a product keeps them (a pixel of every border unlabelled, 128 trajectories).
Rates count process CPU time, scaling down and up included.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage import graph
from skimage.segmentation import slic

from tokenmill.pipeline.mask_metrics import frame_iou, overlaps_of, tube_iou
from tokenmill.pipeline.segment import masks_of
from tokenmill.pipeline.slic3d import Slic3d, Slic3dOptions, shrunk
from tokenmill.schemas.clip import Clip, ClipFrames, Video

NUM_FRAMES, SIDE, SMALL_SIDE = 16, 224, 112
NUM_SHAPES = 5
SPEEDS = {"clean": 0.03, "noisy": 0.03, "fast": 0.09}  # of the side, per frame


def synthetic(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 frames (T,H,W,3), and for each pixel (T,H,W) which shape it shows, from 2; 1 is the background."""
    random, other = (np.random.Generator(np.random.Philox(key=start + seed)) for start in (1000, 99_000))
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    waves, colour = random.uniform(0.5, 2.0, 2) * 2 * np.pi / SIDE, random.uniform(60, 160, 3)
    shapes = [_shape(random, SPEEDS[kind] * SIDE) for _ in range(NUM_SHAPES)]
    texture = gaussian_filter(other.standard_normal((SIDE, SIDE)), 3, mode="wrap")
    frames, ids = np.empty((NUM_FRAMES, SIDE, SIDE, 3)), np.ones((NUM_FRAMES, SIDE, SIDE), np.int32)
    for t in range(NUM_FRAMES):
        smooth = 18 * np.sin(waves[0] * (x + 2 * t)) + 18 * np.cos(waves[1] * (y - t))
        rough = 18 * np.roll(texture / texture.std(), (t, -2 * t), axis=(0, 1))
        frames[t] = colour + (smooth if kind == "clean" else rough)[..., None]
        for number, (square, centre, speed, radius, own, frequency, height) in enumerate(shapes, start=2):
            dy, dx = y - (centre[0] + speed[0] * t), x - (centre[1] + speed[1] * t)
            inside = np.maximum(abs(dy), abs(dx)) <= radius if square else dy * dy + dx * dx <= radius**2
            stripes = height * np.sin(2 * np.pi * frequency * (dx + dy) / SIDE)
            frames[t][inside] = (own + stripes[..., None])[inside]
            ids[t][inside] = number
    if kind != "clean":
        frames += other.normal(0, 8, frames.shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8), ids


def _shape(random: np.random.Generator, speed: float) -> tuple:
    """Whether it is a square; its centre, speed, radius, colour; and the frequency and height of its stripes."""
    return (
        int(random.integers(0, 2)), random.uniform(0.2, 0.8, 2) * SIDE, random.uniform(-speed, speed, 2),
        random.uniform(0.08, 0.2) * SIDE, random.uniform(20, 235, 3), random.uniform(4, 12), random.uniform(8, 25),
    )  # fmt: skip


def ours(frames_THWC: np.ndarray) -> np.ndarray:
    """The tracks of slic3d with its default options."""
    times = tuple(t / 25 for t in range(len(frames_THWC)))
    clip = Clip(
        clip_id="synthetic", video=Video(uri="none", size_bytes=0, digest="0" * 64),
        start_s=0, end_s=1, frame_pts_s=times,
    )  # fmt: skip
    numbers = tuple(range(len(times)))
    one = ClipFrames(
        clip=clip, frames_THWC=frames_THWC, decoded_pts_s=times, frame_numbers=numbers, decoder="benchmark"
    )
    return Slic3d(Slic3dOptions()).segment(one)


def plain(frames_THWC: np.ndarray) -> np.ndarray:
    """3-D SLIC (300 supervoxels, compactness 12, spacing 4:1:1) at 112, and one cut at 22 grey levels."""
    small_Thwc = shrunk(frames_THWC, SMALL_SIDE)
    labels = slic(small_Thwc, n_segments=300, compactness=12, spacing=(4, 1, 1), channel_axis=-1, start_label=0)
    merged = graph.cut_threshold(labels, graph.rag_mean_color(small_Thwc, labels), 22)
    return (merged.repeat(2, axis=1).repeat(2, axis=2) + 1).astype(np.int32)


def measured(segment: Callable[[np.ndarray], np.ndarray], kind: str, num_seeds: int) -> np.ndarray:
    """Per seed: tube IoU, the same as a product, frame IoU, tracks, and CPU seconds."""
    rows = []
    for seed in range(num_seeds):
        frames, ids = synthetic(kind, seed)
        start_s = time.process_time()
        tracks = segment(frames)
        spent_s = time.process_time() - start_s
        product = masks_of(tracks, NUM_FRAMES, 128).tracks_THW
        scores = tube_iou(overlaps_of(tracks, ids)), tube_iou(overlaps_of(product, ids)), frame_iou(tracks, ids)
        rows.append((*scores, len(np.unique(tracks)), spent_s))
    return np.array(rows)


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    num_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print("| clips | method | tube IoU | first 3 seeds | as a product | frame IoU | tracks | frames/core-s |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in SPEEDS:
        for name, segment in (("slic3d", ours), ("plain", plain)):
            segment(synthetic(kind, 0)[0])
            rows = measured(segment, kind, num_seeds)
            tube, product, per_frame, tracks, spent_s = rows.mean(axis=0)
            print(
                f"| {kind} | {name} | {tube:.3f} | {rows[:3, 0].mean():.3f} | {product:.3f} | {per_frame:.3f} |"
                f" {tracks:.1f} | {NUM_FRAMES / spent_s:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
