"""tokenmill estimate: what a recipe would make and cost, from a small sample that is really made."""

import hashlib
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
from rich.filesize import decimal

from ..pipeline.executors import LocalExecutor
from ..pipeline.plan import PlanTables, make_plan
from ..pipeline.plan_file import clips_of
from ..pipeline.sources import list_sources
from ..pipeline.videos import read_facts
from ..schemas.recipe import Recipe
from ..schemas.shard import ShardPlan, ShardReceipt, ShardTask
from .build import build_probers, build_worker
from .printing import new_table, output_console


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What was measured on a sample, and what it makes of the whole."""

    num_videos: int
    num_sampled_videos: int
    num_failed_videos: int
    num_sampled_clips: int
    probe_s: float
    clips_s: float
    scale: float
    num_clips: float
    num_frames: float
    tokens_per_clip: dict[str, int]
    bytes_per_clip: dict[str, float]


def estimate_recipe(recipe: Recipe, most_videos: int, most_clips: int) -> Estimate:
    """Probe up to `most_videos` of the sources, make up to `most_clips` of their clips in a passing cache."""
    listing = list_sources(recipe.sources)
    sample = _sample(listing, most_videos)
    start_s = time.perf_counter()
    tables = make_plan(recipe, read_facts(sample, build_probers(recipe)))
    probe_s = time.perf_counter() - start_s
    scale = listing.num_rows / sample.num_rows
    made = _make_sample(recipe, tables, most_clips) if tables.clips.num_rows else ({}, {}, 0.0, 0)
    tokens_per_clip, bytes_per_clip, clips_s, num_sampled_clips = made
    num_clips = tables.clips.num_rows * scale
    valid = sum(len(times) for times in tables.clips["frame_pts_s"].to_pylist())
    return Estimate(
        num_videos=listing.num_rows,
        num_sampled_videos=sample.num_rows,
        num_failed_videos=tables.videos["status"].to_pylist().count("failed"),
        num_sampled_clips=num_sampled_clips,
        probe_s=probe_s,
        clips_s=clips_s,
        scale=scale,
        num_clips=num_clips,
        num_frames=valid * scale,
        tokens_per_clip=tokens_per_clip,
        bytes_per_clip=bytes_per_clip,
    )


def _sample(listing: pa.Table, most: int) -> pa.Table:
    """Up to `most` rows in an order that has nothing to do with names or folders, yet is the same every time."""
    order = sorted(range(listing.num_rows), key=lambda i: hashlib.sha256(listing["uri"][i].as_py().encode()).digest())
    return listing.take(sorted(order[:most]))


def _first_of_each_video(clips: pa.Table, most_clips: int) -> pa.Table:
    """Up to `most_clips`: about as many neighbouring clips of every video, as a job would decode them."""
    counts: Counter[str] = Counter()
    nth_of_video = []
    for video_id in clips["video_id"].to_pylist():
        nth_of_video.append(counts[video_id])
        counts[video_id] += 1
    order = sorted(range(clips.num_rows), key=nth_of_video.__getitem__)
    return clips.take(sorted(order[:most_clips]))


def _make_sample(
    recipe: Recipe, tables: PlanTables, most_clips: int
) -> tuple[dict[str, int], dict[str, float], float, int]:
    """Tokens and bytes per clip by product, seconds and number of the clips that were made."""
    rows = _first_of_each_video(tables.clips, most_clips)
    with tempfile.TemporaryDirectory(prefix="tokenmill-estimate-") as folder:
        worker = build_worker(recipe, folder)
        plan = ShardPlan(shard_id="estimate", clips=clips_of(rows))
        task = ShardTask(plan=plan, products=tuple(worker.fingerprints))
        for decoder in worker.decoders:  # their start is not the clips'
            list(decoder.decode(plan.clips[:1]))
        start_s = time.perf_counter()
        *_, receipt = LocalExecutor(worker).run([task], lambda: worker, threading.Event())
        clips_s = time.perf_counter() - start_s
    assert isinstance(receipt, ShardReceipt)
    num_made = max(1, receipt.manifests[0].num_rows)
    tokens = {
        product: encoder.layout.num_tokens
        for product, encoder in worker.encoders.items()
        if not encoder.has_trajectories
    }
    sizes = {m.product: sum(file.size_bytes for file in m.files) / num_made for m in receipt.manifests}
    return tokens, sizes, clips_s, rows.num_rows


def print_estimate(estimate: Estimate) -> None:
    """Print the estimate as a table."""
    console, e = output_console(), estimate
    failed = f", {e.num_failed_videos} of them unreadable" if e.num_failed_videos else ""
    console.print(
        f"measured: {e.num_sampled_videos} of {e.num_videos} videos probed in {e.probe_s:.2f} s{failed};"
        f" {e.num_sampled_clips} clips made in {e.clips_s:.2f} s"
    )
    about = "" if e.scale == 1 else "about "
    numbers = ("tokens", "bytes", "bytes per clip")
    title = f"{about}{e.num_clips:,.0f} clips, {e.num_frames:,.0f} frames"
    table = new_table("product", *numbers, numbers=numbers, title=title)
    for product, size_bytes in e.bytes_per_clip.items():
        tokens = e.tokens_per_clip.get(product)
        num_tokens = f"{tokens * e.num_clips:,.0f}" if tokens else ""
        table.add_row(product, num_tokens, decimal(int(size_bytes * e.num_clips)), f"{size_bytes:,.0f}")
    console.print(table)
    if e.num_sampled_clips:
        worker_h = e.clips_s / e.num_sampled_clips * e.num_clips / 3600
        rate = e.num_sampled_clips / e.clips_s
        console.print(
            f"{worker_h:,.3g} hours on one worker ({rate:,.1f} clips/s), and {e.probe_s * e.scale / 3600:,.3g} to plan"
        )
