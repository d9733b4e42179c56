"""tokenmill plan: list and probe the sources, cut clips and shards, and write the plan."""

from collections import Counter
from collections.abc import Collection, Sequence

from ..pipeline.cache_head import register_products
from ..pipeline.manifests import committed_names
from ..pipeline.plan import PlanTables, make_plan
from ..pipeline.plan_file import (
    Plan,
    forget,
    next_number,
    plan_names,
    plans_of,
    read_stamps,
    read_table,
    remember_stamps,
    unseen,
    write_plan,
)
from ..pipeline.sources import list_sources
from ..pipeline.storage import Folder
from ..pipeline.videos import read_facts
from ..pipeline.worker import Worker
from ..schemas.cache_info import CACHE_INFO, CacheInfo, recipe_from_json, recipe_to_json
from ..schemas.errors import CacheError
from ..schemas.recipe import Recipe
from ..schemas.shard import CLIPS, SHORT_DIGEST
from .build import build_driver_worker, build_probers, cache_info, settled
from .display import Display, tracked

SHOWN_VIDEOS = 20


def plan_recipe(recipe: Recipe, display: Display) -> None:
    """Make the recipe's cache know its clips and shards, and say what they are."""
    recipe = settled(recipe)
    worker = build_driver_worker(recipe)
    for plan in plan_cache(recipe, worker, display):
        uri = worker.folder.uri(plan.name)
        display.event("planned", file=uri, clips=plan.num_clips, shards=len(plan.shards()))


def plan_cache(recipe: Recipe, worker: Worker, display: Display, *, again: Collection[str] = ()) -> list[Plan]:
    """Make the recipe's cache know its clips, shards and products; returns all plans.

    `again` are uris of quarantined videos that are to be probed again.
    """
    info = cache_info(recipe, worker)
    claim_cache(worker.folder, info)
    plans = update_plans(recipe, worker.folder, display, again=again)
    register_products(worker.folder, info.products)  # only now: a job that found no video has made no product
    return plans


def claim_cache(folder: Folder, info: CacheInfo) -> None:
    """Make the folder this recipe's cache, or check that it is; CacheError where it is another's."""
    if not folder.exists(CACHE_INFO):
        foreign = [name for name in folder.list("") if not name.startswith(".")]
        if foreign and CACHE_INFO not in foreign and not made_by(folder, info):
            raise CacheError(
                f"{folder.url}: not empty ({foreign[0]} is there) and no token cache: give an empty or new folder"
            )
        folder.create(CACHE_INFO, recipe_to_json(info.recipe))
    try:
        before = recipe_from_json(folder.read(CACHE_INFO), folder.uri(CACHE_INFO))
    except CacheError:
        if not made_by(folder, info):
            raise
        before = {}
    if before and plan_names(folder):  # a claim by a job that got no further binds nothing
        old, new = before["clips"], info.recipe["clips"]
        changed = [f"clips.{key}={old.get(key)} (this recipe: {new[key]})" for key in new if new[key] != old.get(key)]
        if changed:
            raise CacheError(
                f"{folder.url}: this cache was made by another recipe, with {', '.join(changed)}:"
                f" give cache: another folder, or set the values back"
            )
    if before != info.recipe:
        folder.replace(CACHE_INFO, recipe_to_json(info.recipe))


def made_by(folder: Folder, info: CacheInfo) -> bool:
    """Whether manifests of the folder are of these products: then only the head of the cache is lost."""
    versions = {entry.fingerprint[:SHORT_DIGEST] for product, entry in info.products.items() if product != CLIPS}
    return any(name.removesuffix(".json").rpartition("-")[2] in versions for name in committed_names(folder))


def update_plans(recipe: Recipe, folder: Folder, display: Display, *, again: Collection[str] = ()) -> list[Plan]:
    """Add a plan for the videos that no plan of the cache has yet; returns all plans.

    Of several jobs that plan at once one commits; the others look again at what is left to plan.
    """
    listing = list_sources(recipe.sources)
    while True:
        plans = plans_of(folder)
        stamps = forget(read_stamps(folder), again) if plans else None
        new = unseen(listing, stamps)
        display.event("sources", videos=listing.num_rows, unchanged=listing.num_rows - new.num_rows)
        if not new.num_rows:
            return plans
        facts = read_facts(new, build_probers(recipe))
        tables = make_plan(recipe, tracked(facts, "probe", new.num_rows, display), known_videos(folder, plans))
        added = write_plan(folder, tables, number=next_number(plans)) if tables.videos.num_rows else None
        if added or not tables.videos.num_rows:
            break
        display.event("lost_race", plan=next_number(plans))
    if added:
        _show_plan(added, tables, display)
    remember_stamps(folder, stamps, tables.stamps)
    return [*plans, added] if added else plans


def _show_plan(plan: Plan, tables: PlanTables, display: Display) -> None:
    display.event("plan", file=plan.name, clips=plan.num_clips, **Counter(tables.videos["status"].to_pylist()))
    left_out = [row for row in tables.videos.sort_by("uri").to_pylist() if row["status"] != "planned"]
    for row in left_out[:SHOWN_VIDEOS]:
        display.event(row["status"], video=row["uri"], reason=row["reason"])
    if len(left_out) > SHOWN_VIDEOS:
        display.event("left_out", more_videos=len(left_out) - SHOWN_VIDEOS, see="tokenmill sql CACHE 'from videos'")


def known_videos(folder: Folder, plans: Sequence[Plan]) -> dict[tuple[str, str], str]:
    """The latest status of every (video_id, uri) that the plans have."""
    known = {}
    for plan in plans:
        rows = read_table(folder, plan.videos_name).select(["video_id", "uri", "status"]).to_pylist()
        known |= {(row["video_id"], row["uri"]): row["status"] for row in rows}
    return known


def unreadable_videos(folder: Folder, plans: Sequence[Plan]) -> list[str]:
    """The uris of videos that could not be read, or are quarantined, by the last that a plan says of them."""
    latest = {}
    for plan in plans:
        rows = read_table(folder, plan.videos_name).select(["uri", "status"]).to_pylist()
        latest |= {row["uri"]: row["status"] for row in rows}
    return [uri for uri, status in latest.items() if status in ("failed", "quarantined")]
