"""TrajTok's tokenizer against the plainest PyTorch rendering of its specification, at the same tokens.

`python benchmarks/trajtok.py [--frames 16] [--threads 1] [--rounds 3] [--dtype float32]`: seconds of process CPU for
one clip at 224x224 through networks of the published size, part by part, each way in a process of its own, in turns;
medians, the ratio to the plain rendering, peak memory, and how far logits, tokens and labels are from its own.
`plain` computes in float32 whatever `--dtype` says. Weights are pseudo-random and filled by name, so real ones may
give other labels and other shares of time.
`--device cuda`: milliseconds of wall clock in place of seconds of CPU.
"""

import argparse
import json
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
sys.path[:0] = [BENCHMARKS, os.path.join(os.path.dirname(BENCHMARKS), "tests", "tokenizers")]

from plain_trajtok import PlainTrajTok  # noqa: E402
from trajtok_kit import clip, filled, normalized  # noqa: E402

from tokenmill.tokenizers.trajtok import build_segment_vit  # noqa: E402
from tokenmill.tokenizers.trajtok_model import Sizes  # noqa: E402
from tokenmill.tokenizers.trajtok_towers import SegmentVit  # noqa: E402

WAYS = ("plain", "ours")
PARTS = ("patch encoder", "segmenter's perceiver", "heads, logits, labels", "trajectories' perceiver", "ViT")


class Clock:
    """Times methods as they are called: CPU time, or wall clock where a GPU works."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self.spent_s: dict[str, float] = {}

    def now_s(self) -> float:
        if not self._is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, owner: object, name: str, part: str) -> None:
        """Let calls of this method count as `part`."""
        method = getattr(owner, name)

        def timed(*arguments, **options):
            start_s = self.now_s()
            result = method(*arguments, **options)
            self.spent_s[part] = self.spent_s.get(part, 0.0) + self.now_s() - start_s
            return result

        setattr(owner, name, timed)


def prepared(way: str, options: argparse.Namespace, clock: Clock) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """The tokenizer and ViT as a function of normalised frames, with its parts watched."""
    model = filled(build_segment_vit(), "vision_encoder.").to(options.device)
    assert isinstance(model, SegmentVit)
    if way == "plain":
        plain = PlainTrajTok(Sizes(), model.state_dict())
        names = ("patch_features", "queries", "tokens", "vit")
        watched = [(plain, name) for name in names]
        forward = plain
    else:
        model = model.to(getattr(torch, options.dtype))
        encoder = model.traj_tokenizer
        segmenter = encoder.segmenter
        parts = (segmenter.patch_encoder, segmenter.trajectory_perceiver, encoder.traj_feature_updater)
        watched = [(module, "forward") for module in (*parts, model.vision_encoder)]

        def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
            rows, tokens, _, found = model(x.to(getattr(torch, options.dtype)))
            return {"rows": rows, "tokens": tokens, "logits": found.logits_BNK}

    for (owner, name), part in zip(watched, (*PARTS[:2], *PARTS[3:]), strict=True):
        clock.watch(owner, name, part)
    return forward


def measure(way: str, options: argparse.Namespace) -> None:
    """Print seconds of each part and of all for one clip as JSON; its results go to a file."""
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    forward = prepared(way, options, clock)
    x = normalized(clip(options.frames, 224, 7)).to(options.device)
    with torch.inference_mode():
        forward(x[:, :1])  # libraries load, threads start
        if options.device == "cuda":
            forward(x)
        clock.spent_s.clear()
        start_s = clock.now_s()
        found = forward(x)
        total_s = clock.now_s() - start_s
    spent = {"all": total_s, PARTS[2]: total_s - sum(clock.spent_s.values()), **clock.spent_s}
    is_cuda = options.device == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 1e9 if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    torch.save({name: found[name].float().cpu() for name in ("logits", "tokens", "rows")}, options.results)
    print(json.dumps(spent | {"peak": peak}))


def compare(options: argparse.Namespace) -> None:
    """Print the table."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for way in WAYS:
                results = os.path.join(folder, way)
                command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--results", results]
                runs[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                found[way] = torch.load(results)
    unit, scale = ("ms", 1000) if options.device == "cuda" else ("CPU s", 1)
    print(f"| part | plain {unit} | ours {unit} | ours / plain |\n|---|---|---|---|")
    for part in (*PARTS, "all"):
        plain, ours = (statistics.median(run[part] for run in runs[way]) * scale for way in WAYS)
        print(f"| {part} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |")
    plain, ours = (max(run["peak"] for run in runs[way]) for way in WAYS)
    print(f"| peak GB | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |\n")
    far = {name: (found["plain"][name] - found["ours"][name]).abs().max().item() for name in found["plain"]}
    labels, others = (found[way]["logits"].argmax(-1) for way in WAYS)
    print(f"largest differences: {', '.join(f'{name} {value:.2g}' for name, value in far.items())}")
    print(
        f"labels that differ: {int((labels != others).sum())} of {labels.numel()}; slots used: {len(labels.unique())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
