"""VidTok's encoder against the plainest PyTorch rendering of its specification, at the same tokens.

`python benchmarks/vidtok.py [--variant fsq_causal_488_32768] [--size 256] [--threads 2] [--rounds 1]`: seconds of
process CPU for one clip of 17 frames (16 of variants that see later frames), each way in a process of its own, in
turns; medians, ratios to the plain rendering in float32, and the share of codes that differ from its codes. Weights
are pseudo-random and filled by name, so real weights may change other shares of codes.
`--device cuda [--batches 1 2 4 8]`: frames/s, and the share of the peak (989 TFLOP/s of bfloat16 on an H100 or H200)
by the published work of the encoder, 5.82 TFLOP for a clip of 17x256x256.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

BENCHMARKS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [BENCHMARKS, os.path.join(os.path.dirname(BENCHMARKS), "tests", "tokenizers")]

from plain_vidtok import PlainVidTok  # noqa: E402
from vidtok_kit import clip, filled, normalized  # noqa: E402

from tokenmill.tokenizers.vidtok import PART_FRAMES, build  # noqa: E402
from tokenmill.tokenizers.vidtok_model import VidTok  # noqa: E402

WAYS = ("plain", "float32 whole", "float32", "bfloat16", "float16")
CLIP_TFLOP, PEAK_TFLOPS = 5.82, 989.0


def measure(way: str, options: argparse.Namespace) -> dict:
    """CPU seconds, wall seconds, peak memory and codes of one clip."""
    torch.set_num_threads(options.threads)
    model = filled(build(options.variant))
    assert isinstance(model, VidTok)
    variant = model.variant
    x = normalized(clip(variant.window_frames, options.size, options.size))
    if way == "plain":
        encode = PlainVidTok(options.variant, model.state_dict()).encode
    else:
        dtype = getattr(torch, way.split()[0])
        part = max(PART_FRAMES["cpu"], variant.stride_thw[0]) if variant.is_causal and "whole" not in way else None
        model = model.to(dtype)

        def encode(x: torch.Tensor) -> torch.Tensor:
            return model.encode_latent(x.to(dtype), part).float()

    with torch.inference_mode():
        encode(x[..., :32, :32])  # libraries load, threads start
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        h = encode(x)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    codes = model.quantize(h)[1].flatten().tolist() if model.fsq else []
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_gb": peak_gb,
        "codes": codes,
        "latents": h.flatten()[:5000].tolist(),
    }


def compare_on_cpu(options: argparse.Namespace) -> None:
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    plain_s = statistics.median(run["cpu_s"] for run in found["plain"])
    plain = found["plain"][0]
    print("| way | CPU s | of plain | wall s | peak GB | codes that differ | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for way, runs in found.items():
        cpu_s, wall_s = (statistics.median(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
        changed = np.mean(np.array(runs[0]["codes"]) != np.array(plain["codes"])) if plain["codes"] else float("nan")
        error = np.abs(np.array(runs[0]["latents"]) - np.array(plain["latents"])).max()
        print(
            f"| {way} | {cpu_s:.1f} | {plain_s / cpu_s:.2f}x | {wall_s:.1f} | {runs[0]['peak_gb']:.1f} |"
            f" {changed:.2%} | {error:.2g} |"
        )


def measure_on_gpu(options: argparse.Namespace) -> None:
    print("| arithmetic | compiled | batch | frames/s | TFLOP/s | of 989 |\n|---|---|---|---|---|---|")
    tflop = CLIP_TFLOP * (options.size / 256) ** 2
    for kind, is_compiled in [(k, c) for k in ("float32", "tf32", "bfloat16") for c in (False, True)]:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        model = filled(build(options.variant)).to(options.device, dtype)
        assert isinstance(model, VidTok)
        if is_compiled:
            model.encoder.compile()
        num_frames = model.variant.window_frames
        one = normalized(clip(num_frames, options.size, options.size)).to(options.device, dtype)
        for batch in options.batches:
            x = one.expand(batch, -1, -1, -1, -1).contiguous()
            with torch.inference_mode():
                for _ in range(3):
                    model.encode_latent(x)
                torch.cuda.synchronize()
                start_s = time.perf_counter()
                for _ in range(5):
                    model.encode_latent(x)
                torch.cuda.synchronize()
            clips_s = 5 * batch / (time.perf_counter() - start_s)
            frames_s, rate = clips_s * num_frames, clips_s * tflop
            print(f"| {kind} | {is_compiled} | {batch} | {frames_s:.0f} | {rate:.0f} | {rate / PEAK_TFLOPS:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="fsq_causal_488_32768")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
    elif options.device == "cpu":
        compare_on_cpu(options)
    else:
        measure_on_gpu(options)


if __name__ == "__main__":
    main()
