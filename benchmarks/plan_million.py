"""Planning 1,000,000 clips from a table that gives digests, frame counts and frame rates: time and peak memory.

`python benchmarks/plan_million.py [--videos 100000] [--clips-per-video 10] [--fps native]`
"""

import argparse
import hashlib
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.jobs.build import build_probers
from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import write_plan
from tokenmill.pipeline.sources import list_sources
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.videos import read_facts
from tokenmill.schemas.recipe import parse_recipe

NUM_FRAMES = 16


def write_table(path: Path, num_videos: int, clips_per_video: int) -> None:
    """A table of videos that exist nowhere, of 80,000 different lengths and rates."""
    pq.write_table(
        pa.table(
            {
                "uri": [f"s3://bucket/videos/{i:08d}.mp4" for i in range(num_videos)],
                "sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(num_videos)],
                "num_frames": [NUM_FRAMES * clips_per_video - i % NUM_FRAMES for i in range(num_videos)],
                "fps": [24 + i % 5000 / 1000 for i in range(num_videos)],
                "caption": [f"video number {i}" for i in range(num_videos)],
            }
        ),
        path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--clips-per-video", type=int, default=10)
    parser.add_argument("--fps", default="native", help="target rate; videos are then as much longer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "videos.parquet"
        rate = 1 if options.fps == "native" else 24 / float(options.fps)
        write_table(table, options.videos, round(options.clips_per_video * rate))
        recipe = parse_recipe(
            {
                "cache": f"{folder}/cache",
                "sources": [{"kind": "table", "path": str(table)}],
                "clips": {"num_frames": NUM_FRAMES, "fps": options.fps},
                "tokens": {"dct": {"tokenizer": "dct_fsq/488_262144"}},
            }
        )
        start_s = time.perf_counter()
        cache = Folder(recipe.cache)
        tables = make_plan(recipe, read_facts(list_sources(recipe.sources), build_probers(recipe)))
        plan = write_plan(cache, tables)
        assert plan is not None
        seconds = time.perf_counter() - start_s
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        shards = plan.shards()
        size_mb = (Path(recipe.cache) / plan.name).stat().st_size / 1e6
    print("| videos | clips | shards | seconds | peak GB | plan MB |")
    print(f"| {options.videos:,} | {tables.clips.num_rows:,} | {len(shards):,} ", end="")
    print(f"| {seconds:.1f} | {peak_gb:.2f} | {size_mb:.0f} |")


if __name__ == "__main__":
    main()
