"""The index of a large cache: building it, growing it by 1 %, its size, and how soon it answers.

    python benchmarks/index.py make out/index-10m --clips 10000000            # a cache without videos
    python benchmarks/index.py measure out/index-10m
    python benchmarks/index.py make out/index-100k --clips 200000 --clips-per-shard 4   # 100,000 files
    python benchmarks/index.py measure out/index-100k

One process for each step that is timed, so that its peak memory is its own. `measure` takes the last 1 % of manifests
away for a while.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.index import build_index, ensure_index
from tokenmill.pipeline.storage import Folder

LOOKUPS, REPEATS = 200, 5


def make(url: str, num_clips: int, clips_per_shard: int) -> None:
    """Make a cache of one product of four codes a clip. Nothing is forced to the disk: it is no cache to keep."""
    from synthetic import make_cache, tiny_product

    os.fsync = lambda fd: None
    make_cache(url, num_clips, {"tiny": tiny_product()}, clips_per_shard=clips_per_shard)


def measure(url: str) -> None:
    """Print one line of figures after the other."""
    with without_last(Path(url), 0.01):
        _print_step("build from nothing", url, "build")
    _print_step("grow by 1 %", url, "ensure")
    _print_step("open and first answer, up to date", url, "open")
    cache = open_cache(url)
    num_clips = cache.sql("select count(*) as n from clips")["n"][0].as_py()
    size_bytes = os.path.getsize(ensure_index(Folder(url)))
    print(f"size: {size_bytes / 1e6:.0f} MB, {size_bytes / num_clips:.1f} bytes a clip of {num_clips:,}")
    for name, took_s in answers(cache).items():
        print(f"{name}: p50 {np.median(took_s) * 1e3:.2f} ms, p99 {np.quantile(took_s, 0.99) * 1e3:.2f} ms")


@contextmanager
def without_last(cache: Path, share: float) -> Iterator[None]:
    """The manifests of the last shards, by id, are elsewhere."""
    shards = sorted(path.name[:16] for path in (cache / "manifests" / "clips").iterdir())
    last = set(shards[-max(1, round(len(shards) * share)) :])
    held = [path for path in (cache / "manifests").rglob("*.json") if path.name[:16] in last]
    aside = cache / "aside"
    moved = [(path, aside / path.relative_to(cache)) for path in held]
    for path, target in moved:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    try:
        yield
    finally:
        for path, target in moved:
            target.rename(path)
        shutil.rmtree(aside)


def answers(cache: TokenCache) -> dict[str, list[float]]:
    """Seconds of every question, warm."""
    ids = [row["clip_id"] for row in cache.sql(f"select clip_id from clips using sample {LOOKUPS}").to_pylist()]
    one = "select * from clips where clip_id = ?"
    place = "select name, row_in_file from locations where product = ? and clip_id = ?::uuid"
    count = "select count(*) from clips join videos using (video_id) where start_s > 160 and num_valid = 16"
    longest = "select * from clips order by end_s - start_s desc limit 100"
    latest = "select * from clips order by start_s desc limit 100"
    view = "select count(*) from (from tokens_tiny limit 1)"
    return {
        "clip by id": times([(one, [clip_id]) for clip_id in ids], cache),
        "place by id": times([(place, ["tokens/tiny", clip_id]) for clip_id in ids], cache),
        "read one clip": _times([lambda clip_id=clip_id: cache.read("tiny", [clip_id]) for clip_id in ids[:20]]),
        "read 256 clips": _times([lambda: cache.read("tiny", random.sample(ids, min(256, len(ids))))] * REPEATS),
        "filter, join and count": times([(count, [])] * REPEATS, cache),
        "top 100 by an expression": times([(longest, [])] * REPEATS, cache),
        "top 100 by a column": times([(latest, [])] * REPEATS, cache),
        "first row of a view over all files": times([(view, [])] * REPEATS, cache),
    }


def times(queries: Sequence[tuple[str, list[Any]]], cache: TokenCache) -> list[float]:
    """Seconds of every query, after one that is not counted."""
    return _times([lambda query=query, values=values: cache.sql(query, values) for query, values in queries])


def _times(calls: Sequence[Callable[[], object]]) -> list[float]:
    calls[0]()
    took_s = []
    for call in calls:
        start_s = time.perf_counter()
        call()
        took_s.append(time.perf_counter() - start_s)
    return took_s


def step(url: str, name: str) -> Mapping[str, float]:
    """Seconds and peak memory of one step, in this process."""
    start_s = time.perf_counter()
    if name == "build":
        build_index(Folder(url))
    elif name == "ensure":
        ensure_index(Folder(url))
    else:
        open_cache(url).sql("select * from clips where clip_id = ?", ["0" * 32])
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"took_s": time.perf_counter() - start_s, "peak_mib": peak_mib}


def _print_step(name: str, url: str, what: str) -> None:
    done = subprocess.run([sys.executable, __file__, "step", url, what], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    print(f"{name}: {found['took_s']:.2f} s, peak {found['peak_mib']:,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure", "step"])
    parser.add_argument("cache")
    parser.add_argument("step", nargs="?")
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--clips-per-shard", type=int, default=8192)
    options = parser.parse_args()
    if options.what == "make":
        make(options.cache, options.clips, options.clips_per_shard)
    elif options.what == "measure":
        measure(options.cache)
    else:
        print(json.dumps(step(options.cache, options.step)))


if __name__ == "__main__":
    main()
