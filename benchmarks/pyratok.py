"""PyraTok's released networks against the plainest PyTorch rendering of their specification, at the same tokens.

`python benchmarks/pyratok.py [--frames 9] [--side 128] [--threads 1] [--rounds 3] [--ways plain float32 bfloat16]`:
seconds of process CPU to encode and to decode one clip with networks of the published size, each way in a process of
its own, in turns; medians, ratios to the plain rendering in float32, peak memory, the largest difference of latents or
frames, and the share of ids that differ. Weights are pseudo-random and filled by name, so real ones may change other
shares of ids. `float32 whole` is the clip at once in place of groups of four frames.
`--device cuda`: milliseconds of wall clock in place of seconds of CPU.
`--account`: no clock; the shapes that a clip of 17x256x512 has on its way, its tokens and its bits.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

BENCHMARKS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BENCHMARKS)
sys.path[:0] = [BENCHMARKS, os.path.join(ROOT, "tests", "tokenizers")]

from plain_pyratok import PlainPyraTok  # noqa: E402
from pyratok_kit import draw, filled  # noqa: E402

from tokenmill.tokenizers.pyratok import build_release, build_vae  # noqa: E402
from tokenmill.tokenizers.pyratok_quantizer import ResidualSignQuantizer  # noqa: E402

WAYS = ("plain", "float32 whole", "float32", "bfloat16")
PARTS = ("encode", "decode")
NUM_CHANNELS = 16
SURE = 1e-4  # signs of values farther from 0 do not hang on rounding
ACCOUNT_THW, BITS_OF_ID = (17, 256, 512), 16


def prepared(way: str, part: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Frames to means, or latents to frames."""
    with torch.device("meta"):
        vae = build_vae()
    vae = filled(vae.to_empty(device="cpu"), "").to(device)
    if way == "plain":
        plain = PlainPyraTok(vae.state_dict())
        return plain.decode if part == "decode" else lambda x: plain.encode(x)[0]
    vae, in_groups = vae.to(getattr(torch, way.split()[0])), "whole" not in way
    if part == "decode":
        return lambda z: vae.decode(z, 1 if in_groups else None)
    return lambda x: vae.encode(x, in_groups=in_groups).mean_BCthw


def inputs(part: str, options: argparse.Namespace) -> torch.Tensor:
    """Frames (1,3,T,H,W) in [-1,1], or quantized latents of as many (1,16,t,h,w)."""
    if part == "encode":
        return draw("video", (1, 3, options.frames, options.side, options.side)).tanh()
    grid = (1 + (options.frames - 1) // 4, options.side // 8, options.side // 8)
    return ResidualSignQuantizer(NUM_CHANNELS)(draw("latents", (1, NUM_CHANNELS, *grid))).values_BCthw


def measure(way: str, part: str, options: argparse.Namespace) -> None:
    """Print the time and peak memory of one clip as JSON; what comes out goes to a file."""
    torch.set_num_threads(options.threads)
    is_cuda = options.device == "cuda"
    x = inputs(part, options).to(options.device)

    def now_s() -> float:
        if not is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        function = prepared(way, part, options.device)
        function(x)  # libraries load, memory is taken from the system
        start_s = now_s()
        y = function(x)
        spent_s = now_s() - start_s
    peak_gb = (
        torch.cuda.max_memory_allocated() / 1e9 if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    torch.save(y.float().cpu(), options.results)
    print(json.dumps({"spent_s": spent_s, "peak_gb": peak_gb}))


def compare(options: argparse.Namespace) -> None:
    """Print the table."""
    unit, scale = ("ms", 1000) if options.device == "cuda" else ("CPU s", 1)
    print(f"| part | way | {unit} | of plain | peak GB | largest difference | ids that differ | of sure ids |")
    print("|---|---|---|---|---|---|---|---|")
    for part in PARTS:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        made: dict[str, torch.Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(options.rounds):
                for way in options.ways:
                    results = os.path.join(folder, "results")
                    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--part", part]
                    command += ["--results", results]
                    runs[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                    made[way] = torch.load(results)
        seconds = {way: statistics.median(run["spent_s"] for run in runs[way]) for way in runs}
        for way, y in made.items():
            error = (y - made["plain"]).abs().max().item()
            peak_gb = max(run["peak_gb"] for run in runs[way])
            print(
                f"| {part} | {way} | {seconds[way] * scale:.2f} | {seconds[way] / seconds['plain']:.2f} |"
                f" {peak_gb:.2f} | {error:.2g} | {differing(y, made['plain']) if part == 'encode' else ' | '} |"
            )


def differing(mean: torch.Tensor, plain: torch.Tensor) -> str:
    """How many of the ids of these means are not those of the plain rendering: of all, and of those that are sure."""
    quantizer = ResidualSignQuantizer(NUM_CHANNELS)
    ids, wanted = quantizer(mean).ids_BthwQ, quantizer(plain)
    is_other, is_sure = ids != wanted.ids_BthwQ, (wanted.margins_BthwQ > SURE).cumprod(-1).bool()
    return (
        f"{is_other.float().mean():.2%} of {is_other.numel():,} |"
        f" {is_other[is_sure].float().mean():.2%} of {int(is_sure.sum()):,}"
    )


def account() -> None:
    """Print shapes, tokens and bits of a clip; tensors have shapes alone."""
    with torch.device("meta"):
        model = build_release()
        x = torch.empty(1, 3, *ACCOUNT_THW)
        found = model.encode(x, ("down2", "down5", "down8", "mid"))
        ids = model.quantize(found.mean_BCthw).ids_BthwQ
        frames = model.decode(found.mean_BCthw)
    print("| what | channels | frames x rows x columns | sites |\n|---|---|---|---|")
    shapes = {"frames": x, **found.taps, "latents": found.mean_BCthw, "decoded": frames}
    for name, value in shapes.items():
        _, channels, *grid = value.shape
        print(f"| {name} | {channels} | {'x'.join(map(str, grid))} | {math.prod(grid):,} |")
    num_bytes, num_stages = ids.numel() * BITS_OF_ID // 8, ids.shape[-1]
    print(
        f"\nids {tuple(ids.shape)}: {ids.numel() // num_stages:,} tokens a stage, {ids.numel():,} in all;"
        f" {BITS_OF_ID} bits each, {BITS_OF_ID * num_stages} a site; {num_bytes * 8:,} bits = {num_bytes:,} bytes,"
        f" {x.numel() / num_bytes:.1f} times less than RGB, {num_bytes * 8 / math.prod(ACCOUNT_THW):.3f} bits a pixel"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--account", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.account:
        account()
    elif options.way:
        measure(options.way, options.part, options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
