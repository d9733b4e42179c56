"""How long a job takes to find out what is left: a cache of many committed shards, one of them missing.

`python benchmarks/resume.py [--shards 10000]`: videos that exist nowhere, frames made of nothing; every shard is really
committed, one clip each. Then one shard's manifests are removed and the same job runs again.
"""

import argparse
import csv
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tokenmill.jobs.build import build_worker, cache_info
from tokenmill.jobs.display import LineDisplay
from tokenmill.jobs.plan import claim_cache, update_plans
from tokenmill.jobs.run import tasks_of
from tokenmill.jobs.status import read_status
from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.executors import LocalExecutor
from tokenmill.pipeline.index import ensure_index
from tokenmill.pipeline.manifests import compact_manifests
from tokenmill.pipeline.plan_file import plans_of
from tokenmill.pipeline.work import missing_work
from tokenmill.schemas.clip import Clip, ClipFailure, ClipFrames
from tokenmill.schemas.recipe import Recipe, parse_recipe


class Nothing(DirectDecoder):
    """Frames made of nothing but the clips' times."""

    def decode(self, clips: Sequence[Clip]) -> Iterator[ClipFrames | ClipFailure]:
        return self._decoder.decode("", clips)


def run(recipe: Recipe) -> dict[str, float]:
    """Seconds until the work is known, until it is done, and until the index and the account are there."""
    times_s = [time.perf_counter()]
    worker = build_worker(recipe)
    worker = replace(worker, decoders=(Nothing(FakeDecoder(recipe.clips.sampling)),))
    claim_cache(worker.folder, cache_info(recipe, worker))
    update_plans(recipe, worker.folder, LineDisplay())
    todo = missing_work(worker.folder, plans_of(worker.folder), worker.fingerprints)
    times_s.append(time.perf_counter())
    for _ in LocalExecutor(worker).run(tasks_of(worker.folder, todo), lambda: worker, threading.Event()):
        pass
    times_s.append(time.perf_counter())
    compact_manifests(worker.folder)
    ensure_index(worker.folder)
    read_status(recipe.cache)
    times_s.append(time.perf_counter())
    names = ("work known", "made", "index and account")
    print(f"shards to make: {len(todo):,}")
    return {name: after - before for name, before, after in zip(names, times_s, times_s[1:], strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/videos.csv", "w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["uri", "sha256", "num_frames", "fps"])
            writer.writerows([f"{folder}/{i}.mp4", f"{i:064x}", 8, 8] for i in range(options.shards))
        recipe = parse_recipe(
            {
                "cache": f"{folder}/cache",
                "sources": [{"kind": "table", "path": f"{folder}/videos.csv"}],
                "clips": {"num_frames": 8, "height": 16, "width": 16},
                "tokens": {"fake": {"tokenizer": "fake", "batch_size": 1}},
                "shards": {"frames": 8},
            }
        )
        print("first:", {name: round(seconds, 1) for name, seconds in run(recipe).items()})
        for product in ("clips", "tokens/fake"):
            next(iter(sorted(Path(f"{folder}/cache/manifests/{product}").glob("*.json")))).unlink()
        print("resumed:", {name: round(seconds, 2) for name, seconds in run(recipe).items()})


if __name__ == "__main__":
    main()
