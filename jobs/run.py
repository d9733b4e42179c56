"""tokenmill run: recipe -> plan -> executor -> index -> status."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from ..pipeline.index import ensure_index
from ..pipeline.manifests import committed_names, missing_products
from ..pipeline.plan_file import Plan
from ..pipeline.storage import Folder
from ..schemas.recipe import Recipe
from ..schemas.shard import ShardProgress, ShardReceipt, ShardTask
from .build import build_executor, build_worker, cache_info
from .display import Display, Meter
from .interruption import raise_if_interrupted
from .plan import claim_cache, update_plans
from .status import Status, read_status


def run_recipe(recipe: Recipe, display: Display) -> Status:
    """Make all that the recipe asks for and its cache lacks; returns the account of the cache."""
    folder = Folder(recipe.cache)
    worker = build_worker(recipe)
    executor = build_executor(recipe, worker)
    claim_cache(folder, cache_info(recipe, worker))
    plans = update_plans(recipe, folder, display)
    todo = missing_work(folder, plans, worker.fingerprints)
    num_clips = sum(work.num_clips for work in todo)
    display.event("work", clips=num_clips, shards=len(todo), executor=recipe.executor.kind)
    watch(executor.run(tasks_of(todo), partial(build_worker, recipe, folder.url)), num_clips, display)
    ensure_index(folder)
    return read_status(recipe.cache, asked=worker.fingerprints)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingWork:
    """A shard that is not complete: where its plan is, and the products that no manifest names."""

    plan: Plan
    index: int
    num_clips: int
    products: tuple[str, ...]


def missing_work(folder: Folder, plans: Iterable[Plan], fingerprints: Mapping[str, str]) -> list[MissingWork]:
    """Plan minus manifests."""
    committed = committed_names(folder)
    todo = []
    for plan in plans:
        for index, (shard_id, num_clips) in enumerate(plan.shards()):
            products = missing_products(committed, shard_id, fingerprints)
            if products:
                todo.append(MissingWork(plan=plan, index=index, num_clips=num_clips, products=products))
    return todo


def tasks_of(todo: Iterable[MissingWork]) -> Iterator[ShardTask]:
    """The tasks themselves, each read from its plan when an executor asks for it."""
    for work in todo:
        yield ShardTask(plan=work.plan.shard(work.index), products=work.products)


def watch(events: Iterable[ShardProgress | ShardReceipt], total: int, display: Display) -> None:
    """Show what the executor reports until it is done."""
    meter = Meter()
    for event in events:
        raise_if_interrupted()
        if isinstance(event, ShardReceipt):
            meter.add(written=event.manifests[0].num_rows if event.manifests else 0, shards=1)
            if event.num_lost_races:
                display.event("lost_race", shard=event.shard_id, manifests=event.num_lost_races)
        else:
            meter.add(
                decoded=event.num_decoded,
                tokenized=event.num_tokenized,
                frames=event.num_frames,
                failed=len(event.failures),
            )
            for failure in event.failures:
                display.event("failed", clip=failure.clip_id, step=failure.step, reason=failure.reason)
        display.progress("tokens", meter.counts["tokenized"] + meter.counts["failed"], total, meter.shown())
