"""How long queries over many embeddings of frames take, beside a bare scan of the same numbers, and what they hold.

    python benchmarks/relevance.py [--frames 1000000] [--dim 512] [--folder out/relevance_benchmark]

Makes a cache of random embeddings through the library's own shards and commits (which takes minutes, the first time),
of videos that exist nowhere. The bare scan multiplies the same float16 numbers out of one memory map, in as many
threads as DuckDB has. The query of 10,000 frames, and the allocation, are of the same cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tokenmill.jobs.opening import open_cache
from tokenmill.pipeline.allocation import allocate
from tokenmill.pipeline.appended import append
from tokenmill.pipeline.cache_head import register_products
from tokenmill.pipeline.decode import FakeDecoder
from tokenmill.pipeline.decoders import DirectDecoder
from tokenmill.pipeline.frames import FrameEmbedder, FrameMaker
from tokenmill.pipeline.plan import make_plan
from tokenmill.pipeline.plan_file import plans_of, write_plan
from tokenmill.pipeline.queries import add_queries
from tokenmill.pipeline.relevance import unit
from tokenmill.pipeline.scoring import QUERY_EMBEDDINGS, best_frames, raw_scores
from tokenmill.pipeline.shard import process_shard
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.videos import VideoFacts
from tokenmill.pipeline.worker import Worker, fingerprints_of
from tokenmill.schemas.cache_info import CACHE_INFO, ProductInfo, recipe_to_json
from tokenmill.schemas.recipe import parse_recipe
from tokenmill.schemas.relevance import ScorerSpec
from tokenmill.schemas.shard import ShardTask
from tokenmill.schemas.tables import QUERY_EMBEDDING_SCHEMA

FRAMES_PER_CLIP, CLIPS_PER_VIDEO, REPEATS = 16, 625, 5
PRODUCT = "frames/random"


class RandomEncoder:
    """Embeddings that have nothing to do with the frames."""

    def __init__(self, dim: int) -> None:
        self.spec = ScorerSpec(name="random", dim=dim, weights_sha256=None)
        self._rng = np.random.default_rng(0)

    def embed_frames(self, frames_NHWC: np.ndarray) -> np.ndarray:
        """float32 (N,D)."""
        return unit(self._rng.standard_normal((len(frames_NHWC), self.spec.dim or 0), np.float32))

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """float32 (N,D)."""
        return unit(np.random.default_rng(len(texts)).standard_normal((len(texts), self.spec.dim or 0), np.float32))


def make_cache(url: str, num_frames: int, dim: int) -> None:
    """A cache of random embeddings, in shards of 65,536 frames."""
    sections = {"clips": {"num_frames": FRAMES_PER_CLIP, "height": 8, "width": 8}, "shards": {"frames": 65536}}
    recipe = parse_recipe({"cache": url, "sources": ["v"], "frames": {"fps": "all"}, **sections})
    sampling, folder, decoder = recipe.clips.sampling, Folder(url), FakeDecoder(recipe.clips.sampling)
    embedder = FrameEmbedder(encoder=RandomEncoder(dim), batch_size=128)
    maker = FrameMaker(sampling=sampling, fps=None, embedders={PRODUCT: embedder})
    prints = {p: v for p, v in fingerprints_of(decoder, {}, None, maker).items() if p in ("clips", PRODUCT)}
    worker = Worker(
        folder=folder, decoders=(DirectDecoder(decoder),), encoders={}, fingerprints=prints, frame_maker=maker
    )
    spec = {"name": "random", "dim": dim, "takes_texts": True}
    spec["calibration"] = {"rule": "standardized", "scale": 2.0, "bias": -1.0}
    folder.create(CACHE_INFO, recipe_to_json(recipe.model_dump(mode="json")))
    register_products(
        folder,
        {
            "clips": ProductInfo(fingerprint=prints["clips"]),
            PRODUCT: ProductInfo(fingerprint=prints[PRODUCT], encoder=spec, shape=(dim,), section={}),
        },
    )
    num_videos = -(-num_frames // (FRAMES_PER_CLIP * CLIPS_PER_VIDEO))
    write_plan(folder, make_plan(recipe, [_fact(i) for i in range(num_videos)]))
    for plan in plans_of(folder):
        for i in range(len(plan.shards())):
            for _ in process_shard(ShardTask(plan=plan.shard(i), products=tuple(prints)), worker):
                pass
    _know_queries(folder, prints[PRODUCT], dim)


def _know_queries(folder: Folder, version: str, dim: int) -> None:
    """Embeddings of 10,000 queries, as if they had been asked before."""
    texts = [f"query {i}" for i in range(10_000)]
    vectors_ND = unit(np.random.default_rng(1).standard_normal((len(texts), dim), np.float32))
    rows = [
        {"query_id": one, "scorer": "random", "version": version, "embedding": vector_D}
        for one, vector_D in zip(add_queries(folder, texts), vectors_ND, strict=True)
    ]
    append(folder, QUERY_EMBEDDINGS, lambda: pa.Table.from_pylist(rows, schema=QUERY_EMBEDDING_SCHEMA))


def _fact(number: int) -> VideoFacts:
    count = FRAMES_PER_CLIP * CLIPS_PER_VIDEO
    return VideoFacts(
        uri=__file__, stamp="", video_id=f"uri:{number}", size_bytes=-1, caption=None, metadata=None,
        pts_s=np.arange(count) / 16, is_regular=False, end_s=count / 16, fps=16.0, width=8, height=8, codec=None,
        reason=None,
    )  # fmt: skip


def ask(url: str, dim: int) -> dict[str, float]:
    """Seconds of queries (the median of several), and the memory that they took beyond an open cache, in MB."""
    cache = open_cache(url)
    vector_D = RandomEncoder(dim).embed_texts(["a"])[0]
    start_s = time.perf_counter()
    num_frames = cache.sql("select count(*) as n from (select frame from frames_random)")["n"][0].as_py()
    figures = {"open_s": time.perf_counter() - start_s}
    figures["top100_s"] = _median_s(lambda: best_frames(cache, "random", vector_D, 100, by="frame"))
    figures["search_of_10000_known_queries_s"] = _median_s(lambda: cache.search("query 77", k=100))
    figures["top100_clips_s"] = _median_s(lambda: best_frames(cache, "random", vector_D, 100, by="clip"))
    figures["peak_memory_mb"] = _memory_mb()  # of the whole process, torch included
    one = cache.sql("select video_id from clips group by 1 order by 1 limit 1")["video_id"][0].as_py()
    where = f"video_id = '{one}'"
    figures["frames_of_one"] = raw_scores(cache, "random", vector_D, where).num_rows
    figures["one_video_s"] = _median_s(lambda: raw_scores(cache, "random", vector_D, where))
    p_N = np.random.default_rng(0).random(int(figures["frames_of_one"]))
    for policy in ("global", "fragment", "utility"):
        figures[f"allocate_{policy}_s"] = _median_s(lambda policy=policy: allocate(p_N, 64 * len(p_N), policy))
    figures["num_frames"] = num_frames
    return figures


def scan(path: str, dim: int) -> dict[str, float]:
    """Seconds of the bare scan, and of a flat copy of the embeddings in memory."""
    torch.set_num_threads(1)
    data = np.memmap(path, "<f2", "c").reshape(-1, dim)
    vector_D = torch.from_numpy(RandomEncoder(dim).embed_texts(["a"])[0])
    parts = np.array_split(np.arange(len(data)), max(1, len(data) // 8192))

    def top100() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            scored = list(
                pool.map(lambda rows: torch.from_numpy(data[rows[0] : rows[-1] + 1]).float() @ vector_D, parts)
            )
        torch.cat(scored).topk(100)

    return {"bare_s": _median_s(top100)}


def _median_s(act: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start_s)
    return sorted(taken)[REPEATS // 2]


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", default="out/relevance_benchmark")
    parser.add_argument("--only", choices=["ask", "scan"], help="in a process of its own")
    options = parser.parse_args()
    url, flat = f"{options.folder}/cache-{options.frames}-{options.dim}", f"{options.folder}/flat.f2"
    if options.only:
        print(json.dumps(ask(url, options.dim) if options.only == "ask" else scan(flat, options.dim)))
        return
    if not Path(url).exists():
        start_s = time.perf_counter()
        make_cache(url, options.frames, options.dim)
        print(f"made in {time.perf_counter() - start_s:.0f} s", flush=True)
    rng = np.random.default_rng(0)
    with open(flat, "wb") as stream:
        for _ in range(-(-options.frames // 65536)):
            stream.write(unit(rng.standard_normal((65536, options.dim), np.float32)).astype("<f2").tobytes())
    for only in ("scan", "ask"):
        command = [sys.executable, __file__, "--only", only, "--folder", options.folder]
        command += ["--frames", str(options.frames), "--dim", str(options.dim)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, value in json.loads(found).items():
            print(f"{name}: {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
