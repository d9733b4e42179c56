"""tokenmill status: what a cache holds, what failed, and how fast it was made."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ..pipeline.cache import TokenCache, open_cache
from .printing import new_table, output_console

SHOWN_FAILURES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductStatus:
    """One product's account: planned = committed + failed + quarantined once the job is complete."""

    product: str
    tokenizer: str | None
    planned: int
    committed: int
    failed: int
    quarantined: int
    num_files: int
    size_bytes: int
    clips_per_worker_s: float

    @property
    def missing(self) -> int:
        """Clips that are neither committed nor named as failed or quarantined."""
        return self.planned - self.committed - self.failed - self.quarantined


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCount:
    """How many clips or videos failed or are quarantined for one reason, and a video among them."""

    status: str
    step: str
    reason: str
    n: int
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The account of a whole cache. `asked` are the products that the exit code is about.

    `videos` counts by status in the plans, `clip_videos` those of them with failed or quarantined clips. `worker_s`
    are the seconds of all workers by what they spent them on, waiting for decoded frames included.
    """

    cache: str
    snapshot: int | None
    videos: dict[str, int]
    clip_videos: dict[str, int]
    worker_s: dict[str, float]
    num_dropped_frames: int
    num_shards: int
    products: list[ProductStatus]
    failures: list[FailureCount]
    asked: list[str]

    @property
    def exit_code(self) -> int:
        """0 complete, 1 clips are missing, 3 complete but some clips or videos failed or are quarantined."""
        if any(product.missing for product in self.products if product.product in self.asked):
            return 1
        return 3 if self.failures else 0

    def values(self) -> dict[str, Any]:
        """The account as plain values."""
        return {**asdict(self), "exit_code": self.exit_code}


def read_status(uri: str, asked: Iterable[str] | None = None, snapshot: int | None = None) -> Status:
    """The account of the cache at `uri`, from its index; about all of its products unless some are `asked` for."""
    cache = open_cache(uri, snapshot)
    videos = cache.sql("""
        select status, count(*) as n, sum(num_dropped_frames)::bigint as dropped from videos group by status
        union all select 'duplicate', count(*), 0 from duplicates having count(*) > 0""")
    failures = cache.sql("""
        select status, step, reason, count(distinct coalesce(clip_id, uri)) as n, min(uri) as uri from failures
        group by 1, 2, 3 order by n desc, status, step, uri, reason""")
    clip_videos = cache.sql("""
        select status, count(distinct video_id) as n from failures where clip_id is not null group by 1""")
    return Status(
        cache=cache.folder.url,
        snapshot=snapshot,
        videos=dict(zip(videos["status"].to_pylist(), videos["n"].to_pylist(), strict=True)),
        clip_videos=dict(zip(clip_videos["status"].to_pylist(), clip_videos["n"].to_pylist(), strict=True)),
        worker_s=_worker_s(cache),
        num_dropped_frames=int(sum(videos["dropped"].to_pylist())),
        num_shards=cache.sql("select count(*) as n from plan_shards")["n"][0].as_py(),
        products=_read_products(cache),
        failures=[FailureCount(**row) for row in failures.to_pylist()],
        asked=list(cache.info.products if asked is None else asked),
    )


def _read_products(cache: TokenCache) -> list[ProductStatus]:
    rows = cache.sql("""
        with planned as (select sum(num_clips) as n from plan_shards where not is_retry),
             sizes as (select product, count(*) as num_files, sum(size_bytes) as size_bytes from files group by 1),
             done as (select product, sum(num_clips) as committed,
                             sum(decode_s + segment_s + coalesce(embed_s, 0) + tokenize_s + write_s) as busy_s
                      from shards group by 1),
             failures as (select product, count(*) filter (status = 'failed') as failed,
                                 count(*) filter (status = 'quarantined') as quarantined
                          from failures where clip_id is not null group by 1)
        select p.product, coalesce(p.tokenizer, p.segmenter, p.encoder) as tokenizer,
               coalesce(planned.n, 0)::bigint as planned,
               coalesce(committed, 0)::bigint as committed, coalesce(failed, 0) as failed,
               coalesce(quarantined, 0) as quarantined,
               coalesce(num_files, 0) as num_files, coalesce(size_bytes, 0)::bigint as size_bytes,
               coalesce(committed / nullif(busy_s, 0), 0)::double as clips_per_worker_s
        from products p left join done using (product) left join sizes using (product)
             left join failures using (product), planned
        order by p.product""")
    return [ProductStatus(**row) for row in rows.to_pylist()]


def _worker_s(cache: TokenCache) -> dict[str, float]:
    """Seconds by step. Products that were made together have the same clock, apart from writing."""
    (row,) = cache.sql("""
        with made as (select shard_id, host, decode_s, segment_s, embed_s, tokenize_s, sum(write_s) as write_s
                      from shards group by all)
        select coalesce(sum(decode_s), 0)::double as "decode wait", coalesce(sum(segment_s), 0)::double as segment,
               coalesce(sum(embed_s), 0)::double as embed, coalesce(sum(tokenize_s), 0)::double as tokenize,
               coalesce(sum(write_s), 0)::double as write from made""").to_pylist()
    return row


def show_status(status: Status, *, log_json: bool) -> None:
    """Print the account as tables, or as one JSON line."""
    if log_json:
        print(json.dumps({"event": "status", **status.values()}), flush=True)
        return
    console = output_console()
    found = ", ".join(f"{n} {what}" for what, n in sorted(status.videos.items(), key=lambda item: -item[1]))
    dropped = f"; {status.num_dropped_frames} frames dropped at the ends" if status.num_dropped_frames else ""
    at = f" at snapshot {status.snapshot}" if status.snapshot else ""
    console.print(f"\n{status.cache}{at}", markup=False, soft_wrap=True)
    console.print(f"videos: {found or 'none'}{dropped}; {status.num_shards} shards")
    for what, n in sorted(status.clip_videos.items()):
        console.print(f"{what} clips are of {n} videos")
    console.print(_product_table(status))
    if total_s := sum(status.worker_s.values()):
        shares = ", ".join(f"{step} {seconds / total_s:.0%}" for step, seconds in status.worker_s.items())
        console.print(f"workers: {shares} of {total_s:,.1f} s")
    for product in status.products:
        if product.missing:
            how = "run the recipe again" if product.product in status.asked else "run a recipe that asks for it"
            console.print(f"{product.product}: {product.missing} clips are not made yet: {how} to resume")
    if status.failures:
        console.print(_failure_table(status))
        console.print("tokenmill retry CACHE tries what failed or is quarantined again")
    if len(status.failures) > SHOWN_FAILURES:
        console.print(
            f'… and {len(status.failures) - SHOWN_FAILURES} more reasons: tokenmill sql CACHE "from failures"'
        )


def _product_table(status: Status) -> Table:
    """The products; clips/s is the rate of one worker."""
    numbers = ("planned", "committed", "failed", "quarantined", "size", "clips/s")
    table = new_table("product", "tokenizer", *numbers, numbers=numbers)
    for product in status.products:
        table.add_row(
            product.product,
            product.tokenizer or "",
            f"{product.planned:,}",
            f"{product.committed:,}",
            f"{product.failed:,}",
            f"{product.quarantined:,}",
            decimal(product.size_bytes),
            f"{product.clips_per_worker_s:,.1f}",
        )
    return table


def _failure_table(status: Status) -> Table:
    table = new_table("status", "step", "count", "reason", "for instance", numbers=("count",), title="failures")
    for failure in status.failures[:SHOWN_FAILURES]:
        video = failure.uri.rpartition("/")[2]
        table.add_row(failure.status, failure.step, str(failure.n), escape(failure.reason), escape(video))
    return table
