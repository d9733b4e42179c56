"""tokenmill retry: what failed or is quarantined is tried again, in shards of its own.

The retry is committed as a plan before any work, so whatever ends this job, the next run or retry goes on with it.
"""

from ..pipeline.cache_head import read_info
from ..pipeline.plan_file import plans_of
from ..pipeline.retries import apply_storage_options
from ..pipeline.retry_plan import plan_retries
from ..pipeline.storage import Folder
from ..pipeline.work import missing_work
from ..pipeline.worker import Worker
from ..schemas.cache_info import CacheInfo
from ..schemas.errors import CacheError
from ..schemas.recipe import Recipe, parse_recipe
from .build import build_driver_worker, check_executor, recipe_of, settled
from .display import Display
from .plan import plan_cache, unreadable_videos
from .recipes import override
from .run import make_missing
from .status import Status


def retry_cache(cache: str, overrides: list[str], display: Display) -> Status | None:
    """Try again all failed and quarantined clips and videos, as a run of the cache's own recipe with `overrides`.

    Returns the account of the cache; None where there is nothing to retry.
    """
    recipe, info = recipe_of_cache(cache, overrides)
    check_executor(recipe)
    recipe = settled(recipe)
    worker = build_driver_worker(recipe)
    refuse_other_versions(worker, info)
    retries = plan_retries(worker.folder, recipe, worker.fingerprints)
    plans = plans_of(worker.folder)
    videos = unreadable_videos(worker.folder, plans)
    todo = [work for work in missing_work(worker.folder, plans, worker.fingerprints) if work.plan.is_retry]
    if not todo and not videos:
        display.event("nothing_to_retry", cache=worker.folder.url)
        return None
    display.event(
        "retry", clips=sum(work.num_clips for work in todo), shards=len(todo), plans=len(retries), videos=len(videos)
    )
    plan_cache(recipe, worker, display, again=videos)
    return make_missing(recipe, worker, display)


def recipe_of_cache(cache: str, overrides: list[str]) -> tuple[Recipe, CacheInfo]:
    """The recipe of all that the cache holds, wherever it lies now, and the cache's head."""
    storage: dict = {"storage": {}}  # never stored, and needed to read the rest
    for change in overrides:
        if change.startswith("storage."):
            override(storage, change)
    apply_storage_options(storage["storage"])
    info = read_info(Folder(cache))
    data = {**recipe_of(info).model_dump(mode="json"), "cache": cache}
    for change in overrides:
        override(data, change)
    return parse_recipe(data), info


def refuse_other_versions(worker: Worker, info: CacheInfo) -> None:
    """CacheError where `worker` would begin a new version: retries and repairs add to the products that are there."""
    for product, version in worker.fingerprints.items():
        if product not in info.products or info.products[product].fingerprint != version:
            raise CacheError(
                f"{worker.folder.url}: {product} would be another version: its settings, weights, tokenizer or decoder"
                f" are not those that made it; set them back, or run a recipe to make the new version"
            )
