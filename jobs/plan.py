"""tokenmill plan: list and probe the sources, cut clips and shards, and write the plan."""

import os
from collections import Counter

from ..pipeline.manifests import committed_names
from ..pipeline.plan import make_plan
from ..pipeline.plan_file import Plan, plans_of, read_stamps, read_table, remember_stamps, unseen, write_plan
from ..pipeline.sources import list_sources
from ..pipeline.storage import Folder
from ..pipeline.videos import read_facts
from ..schemas.cache_info import CACHE_INFO, CacheInfo
from ..schemas.errors import CacheError
from ..schemas.recipe import Recipe
from ..schemas.shard import CLIPS, SHORT_DIGEST
from .build import build_worker, cache_info
from .display import Display, tracked

SHOWN_VIDEOS = 20


def plan_recipe(recipe: Recipe, display: Display) -> None:
    """Make the recipe's cache know its clips and shards, and say what they are."""
    folder = Folder(recipe.cache)
    claim_cache(folder, cache_info(recipe, build_worker(recipe)))
    for plan in update_plans(recipe, folder, display):
        display.event("planned", file=folder.uri(plan.name), clips=plan.num_clips, shards=len(plan.shards()))


def claim_cache(folder: Folder, info: CacheInfo) -> None:
    """Make the folder this recipe's cache, or check that it is; CacheError where it is another's."""
    if not folder.exists(CACHE_INFO):
        foreign = [name for name in folder.list("") if not name.startswith(".")]
        if foreign and CACHE_INFO not in foreign and not made_by(folder, info):
            raise CacheError(
                f"{folder.url}: not empty ({foreign[0]} is there) and no token cache: give an empty or new folder"
            )
        folder.create(CACHE_INFO, info.to_json())
    try:
        before = CacheInfo.from_json(folder.read(CACHE_INFO), folder.uri(CACHE_INFO))
    except CacheError:
        if not made_by(folder, info):
            raise
        folder.replace(CACHE_INFO, info.to_json())
        before = info
    if not plans_of(folder):  # claimed by a run that got no further: nothing binds it yet
        before = info
        folder.replace(CACHE_INFO, info.to_json())
    old, new = before.recipe["clips"], info.recipe["clips"]
    changed = [f"clips.{key}={old.get(key)} (this recipe: {new[key]})" for key in new if new[key] != old.get(key)]
    if changed:
        raise CacheError(
            f"{folder.url}: this cache was made by another recipe, with {', '.join(changed)}:"
            f" give cache: another folder, or set the values back"
        )
    merged = CacheInfo(recipe=info.recipe, products={**before.products, **info.products})
    if merged.to_json() != before.to_json():
        folder.replace(CACHE_INFO, merged.to_json())


def made_by(folder: Folder, info: CacheInfo) -> bool:
    """Whether manifests of the folder are of these products: then only the head of the cache is lost."""
    versions = {entry.fingerprint[:SHORT_DIGEST] for product, entry in info.products.items() if product != CLIPS}
    return any(name.removesuffix(".json").rpartition("-")[2] in versions for name in committed_names(folder))


def update_plans(recipe: Recipe, folder: Folder, display: Display) -> list[Plan]:
    """Add a plan for the videos that no plan of the cache has yet; returns all plans."""
    plans = plans_of(folder)
    stamps = read_stamps(folder) if plans else None
    listing = list_sources(recipe.sources)
    new = unseen(listing, stamps)
    display.event("sources", videos=listing.num_rows, unchanged=listing.num_rows - new.num_rows)
    if not new.num_rows:
        return plans
    facts = read_facts(new, num_threads=2 * (os.cpu_count() or 1))
    tables = make_plan(recipe, tracked(facts, "probe", new.num_rows, display), known_videos(folder, plans))
    if tables.videos.num_rows:
        name = write_plan(folder, tables)
        display.event("plan", file=name, clips=tables.clips.num_rows, **Counter(tables.videos["status"].to_pylist()))
        left_out = [row for row in tables.videos.sort_by("uri").to_pylist() if row["status"] != "planned"]
        for row in left_out[:SHOWN_VIDEOS]:
            display.event(row["status"], video=row["uri"], reason=row["reason"])
        if len(left_out) > SHOWN_VIDEOS:
            display.event("left_out", more_videos=len(left_out) - SHOWN_VIDEOS, see="tokenmill sql CACHE 'from videos'")
    remember_stamps(folder, stamps, tables.stamps)
    return plans_of(folder)


def known_videos(folder: Folder, plans: list[Plan]) -> dict[tuple[str, str], str]:
    """The status of every (video_id, uri) that the plans have."""
    known = {}
    for plan in plans:
        rows = read_table(folder, plan.videos_name).select(["video_id", "uri", "status"]).to_pylist()
        known |= {(row["video_id"], row["uri"]): row["status"] for row in rows}
    return known
