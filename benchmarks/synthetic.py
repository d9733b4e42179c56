"""Caches of made-up clips, of any size, without videos and without decoding: for benchmarks of what reads caches.

    python benchmarks/synthetic.py out/synthetic --clips 10000000

Files, manifests and the plan are those that a job commits, made by the library's own writers a shard at a time.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.pipeline.cache_head import register_products
from tokenmill.pipeline.commit import commit_manifests, publish_file
from tokenmill.pipeline.plan import PlanTables
from tokenmill.pipeline.plan_file import write_plan
from tokenmill.pipeline.storage import Folder
from tokenmill.pipeline.store import TOKEN_ROWS_SCHEMA
from tokenmill.pipeline.token_file import FINGERPRINT, TokenLayout, write_token_file
from tokenmill.pipeline.trajectory_file import write_trajectory_file
from tokenmill.schemas.cache_info import CACHE_INFO, ProductInfo, recipe_to_json
from tokenmill.schemas.digest import digest_of
from tokenmill.schemas.recipe import parse_recipe
from tokenmill.schemas.shard import CLIPS, ShardManifest, tokens_product
from tokenmill.schemas.tables import CLIP_SCHEMA, PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA, with_format
from tokenmill.schemas.tokens import TrajectoryTokens

FRAMES_PER_CLIP, CLIPS_PER_VIDEO, FPS = 16, 600, 30.0
SIZE_BYTES = 50_000_000  # of a video, if there were any


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeProduct:
    """A product of tokens. `values(first, count)` gives the tokens of `count` rows from number `first` on: codes
    (N,...) or the bits of latents (N,...), and of trajectories (a layout of one dimension) a list of TrajectoryTokens.

    Rows are numbered from 0 through the shards in the order they are made, in a shard by clip id, as its files have
    them: the id of row i is the same for the same `seed`, number of clips and `clips_per_shard`.
    """

    layout: TokenLayout
    values: Callable[[int, int], np.ndarray | Sequence[TrajectoryTokens]]

    @property
    def kind(self) -> str:
        """As TokenizerSpec has it."""
        if self.layout.codebook_size:
            return "discrete"
        return "trajectory" if len(self.layout.shape) == 1 else "continuous"


def make_cache(
    url: str, num_clips: int, products: Mapping[str, MadeProduct], *, clips_per_shard: int = 5120, seed: int = 0
) -> None:
    """Make a whole cache at `url`, where there is none: `products` by name become the products ``tokens/<name>``.

    Clips are runs of 16 frames of videos of 600 clips, at 30 frames a second; their ids are random.
    """
    folder, rng = Folder(url), np.random.default_rng(seed)
    versions = {product: digest_of(["synthetic", product]) for product in [CLIPS, *map(tokens_product, products)]}
    recipe = {"cache": url, "sources": ["videos"], "shards": {"frames": clips_per_shard * FRAMES_PER_CLIP}}
    recipe["tokens"] = {name: {"tokenizer": "fake"} for name in products}
    folder.create(CACHE_INFO, recipe_to_json(parse_recipe(recipe).model_dump(mode="json")))
    entries = {tokens_product(name): _entry(one, versions[tokens_product(name)]) for name, one in products.items()}
    register_products(folder, {CLIPS: ProductInfo(fingerprint=versions[CLIPS]), **entries})
    videos, planned = _videos(num_clips), []
    with folder.staging() as staging:
        for first in range(0, num_clips, clips_per_shard):
            clips = _clips(first, min(clips_per_shard, num_clips - first), videos, rng)
            planned.append(clips.select(PLAN_SCHEMA.names))
            shard = _Shard(folder, staging, versions, clips)
            shard.write_clips()
            for name, one in products.items():
                shard.write_tokens(name, one, first)
    stamps = STAMP_SCHEMA.empty_table()
    write_plan(folder, PlanTables(videos=videos, clips=pa.concat_tables(planned).combine_chunks(), stamps=stamps))


def _entry(one: MadeProduct, version: str) -> ProductInfo:
    layout = one.layout
    tokenizer = {"name": "synthetic", "kind": one.kind, "codebook_size": layout.codebook_size, "dtype": layout.dtype}
    return ProductInfo(
        fingerprint=version,
        tokenizer=tokenizer,
        shape=layout.shape,
        levels=layout.levels,
        section={"tokenizer": "fake"},
    )


def _videos(num_clips: int) -> pa.Table:
    """All videos (VIDEO_SCHEMA), in the order of their ids; the last one may be shorter."""
    count = -(-num_clips // CLIPS_PER_VIDEO)
    num_clips_V = np.minimum(CLIPS_PER_VIDEO, num_clips - CLIPS_PER_VIDEO * np.arange(count))
    ids = sorted(hashlib.sha256(str(i).encode()).hexdigest() for i in range(count))
    columns = {
        "video_id": ids,
        "uri": [f"/videos/{digest[:20]}.mp4" for digest in ids],
        "size_bytes": np.full(count, SIZE_BYTES),
        "num_frames": num_clips_V * FRAMES_PER_CLIP,
        "fps": np.full(count, FPS),
        "width": np.full(count, 1280, np.int32),
        "height": np.full(count, 720, np.int32),
        "duration_s": num_clips_V * FRAMES_PER_CLIP / FPS,
        "caption": [f"caption of video {i}" for i in range(count)],
        "num_clips": num_clips_V,
        "num_dropped_frames": np.zeros(count, np.int64),
        "status": ["planned"] * count,
    }
    absent = {name: pa.nulls(count) for name in VIDEO_SCHEMA.names if name not in columns}
    return pa.table(columns | absent).select(VIDEO_SCHEMA.names).cast(VIDEO_SCHEMA)


def _clips(first: int, count: int, videos: pa.Table, rng: np.random.Generator) -> pa.Table:
    """The clips of one shard in the order of the plan, with the columns of PLAN_SCHEMA and CLIP_SCHEMA.

    Long columns that repeat are dictionaries: the plan of ten million clips is held in memory.
    """
    number_N = np.arange(first, first + count)
    starts_s_N = number_N % CLIPS_PER_VIDEO * (FRAMES_PER_CLIP / FPS)
    pts_s_NT = ((number_N % CLIPS_PER_VIDEO * FRAMES_PER_CLIP)[:, None] + np.arange(FRAMES_PER_CLIP)) / FPS
    hex_digits = rng.bytes(16 * count).hex()
    video_N = pa.array(number_N // CLIPS_PER_VIDEO, pa.int32())
    shard_id = hashlib.sha256(f"synthetic shard {first}".encode()).hexdigest()[:16]
    columns = {
        "shard_id": pa.array([shard_id] * count),
        "clip_id": pa.array([hex_digits[32 * i : 32 * i + 32] for i in range(count)]),
        "video_id": pa.DictionaryArray.from_arrays(video_N, videos["video_id"].combine_chunks()),
        "uri": pa.DictionaryArray.from_arrays(video_N, videos["uri"].combine_chunks()),
        "size_bytes": np.full(count, SIZE_BYTES),
        "start_s": starts_s_N,
        "end_s": starts_s_N + FRAMES_PER_CLIP / FPS,
        "num_valid": np.full(count, FRAMES_PER_CLIP, np.uint32),
        "frame_pts_s": pa.ListArray.from_arrays(
            np.arange(0, FRAMES_PER_CLIP * count + 1, FRAMES_PER_CLIP, dtype=np.int32),
            pts_s_NT.ravel(),
            type=CLIP_SCHEMA.field("frame_pts_s").type,
        ),
        "decoder": pa.array(["synthetic"] * count),
    }
    return pa.table(columns)


class _Shard:
    """One shard, whose files are written, published and committed product by product."""

    def __init__(self, folder: Folder, staging: str, versions: Mapping[str, str], clips: pa.Table) -> None:
        self._folder, self._path, self._versions = folder, f"{staging}/shard.parquet", versions
        self._shard_id = str(clips["shard_id"][0].as_py())
        self._clips = clips.select(CLIP_SCHEMA.names).sort_by("clip_id").cast(CLIP_SCHEMA)
        counts = self._clips["video_id"].value_counts().to_pylist()
        self._clips_per_video = {one["values"]: one["counts"] for one in counts}

    def write_clips(self) -> None:
        """Commit what was decoded, if it had been."""
        schema = with_format(CLIP_SCHEMA, **self._footer(CLIPS))
        pq.write_table(self._clips.cast(schema), self._path, compression="zstd", write_page_checksum=True)
        self._commit(CLIPS)

    def write_tokens(self, name: str, one: MadeProduct, first: int) -> None:
        """Commit the tokens of one product, those of rows `first` and on."""
        product, values = tokens_product(name), one.values(first, self._clips.num_rows)
        if one.kind == "trajectory":
            assert not isinstance(values, np.ndarray)
            clip_ids = self._clips["clip_id"].to_pylist()
            write_trajectory_file(self._path, clip_ids, values, one.layout, self._footer(product))
        else:
            assert isinstance(values, np.ndarray)
            rows = self._clips.select(TOKEN_ROWS_SCHEMA.names)
            write_token_file(self._path, rows, values, one.layout, self._footer(product))
        self._commit(product)

    def _footer(self, product: str) -> dict[str, str]:
        return {FINGERPRINT.decode(): self._versions[product]}

    def _commit(self, product: str) -> None:
        file = publish_file(self._folder, self._path, f"{product}/{self._shard_id}", self._clips.num_rows)
        manifest = ShardManifest(
            shard_id=self._shard_id,
            product=product,
            fingerprint=self._versions[product],
            files=(file,),
            failures=(),
            clips_per_video=self._clips_per_video,
            host="synthetic",
            timings_s={},
        )
        commit_manifests(self._folder, [manifest])


def tiny_product(num_codes: int = 4) -> MadeProduct:
    """`num_codes` random codes to a clip."""
    layout = TokenLayout(dtype="uint16", shape=(1, 1, num_codes), codebook_size=1 << 16)
    return MadeProduct(
        layout=layout,
        values=lambda first, count: np.random.default_rng(first).integers(
            0, 1 << 16, (count, *layout.shape), np.uint16
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--clips-per-shard", type=int, default=16384)
    options = parser.parse_args()
    start_s = time.perf_counter()
    make_cache(options.cache, options.clips, {"tiny": tiny_product()}, clips_per_shard=options.clips_per_shard)
    print(f"{options.clips:,} clips in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
