"""A retry: a plan whose shards hold just the clips that failed in their latest attempt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.errors import CacheError
from ..schemas.recipe import Recipe
from ..schemas.shard import ShardManifest
from ..schemas.tables import PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA
from .account import FailedClip, accounts_of
from .manifests import read_manifests
from .plan import COST_SCHEMA, PlanTables, cut_shards
from .plan_file import Plan, next_number, plans_of, read_table, write_plan
from .storage import Folder


def plan_retries(folder: Folder, recipe: Recipe, fingerprints: Mapping[str, str]) -> list[Plan]:
    """Commit retries for all clips of these product versions that failed and wait for no retry yet; returns them.

    There is one retry for every set of products that clips failed for: all of them where a video could not be decoded.
    """
    retries = []
    while True:
        # Manifests first: they are never taken back, so what they call failed was planned by these plans.
        manifests = read_manifests(folder, fingerprints)
        plans = plans_of(folder)
        waiting = _waiting_clips(plans, manifests, fingerprints)
        if not waiting:
            return retries
        products = min(waiting)
        number = next_number(plans)
        tables = _retry_tables(folder, recipe, plans, waiting[products], number)
        retry = write_plan(folder, tables, number=number, retries={p: fingerprints[p] for p in products})
        if retry:
            retries.append(retry)


def _waiting_clips(
    plans: Sequence[Plan], manifests: Sequence[ShardManifest], fingerprints: Mapping[str, str]
) -> dict[tuple[str, ...], dict[str, FailedClip]]:
    """The failed clips that no retry holds, by the products that they failed for."""
    products: defaultdict[str, list[str]] = defaultdict(list)
    failed: dict[str, FailedClip] = {}
    for account in accounts_of(plans, manifests, fingerprints):
        for clip_id in account.failed.keys() - account.retrying:
            products[clip_id].append(account.product)
        failed |= account.failed
    waiting: defaultdict[tuple[str, ...], dict[str, FailedClip]] = defaultdict(dict)
    for clip_id, names in products.items():
        waiting[tuple(sorted(names))][clip_id] = failed[clip_id]
    return waiting


def _retry_tables(
    folder: Folder, recipe: Recipe, plans: Sequence[Plan], failed: Mapping[str, FailedClip], number: int
) -> PlanTables:
    """The clips `failed` cut into shards of their own, and the rows of their videos.

    The number of the plan is digested into the shards' ids: a shard that fails as a whole is another one next time.
    """
    shard_ids = {clip.shard_id for clip in failed.values()}
    clip_ids = pa.array(sorted(failed), pa.string())
    clips, videos = [PLAN_SCHEMA.empty_table()], [VIDEO_SCHEMA.empty_table()]
    for plan in plans:
        indexes = [i for i, (shard_id, _) in enumerate(plan.shards()) if shard_id in shard_ids]
        if indexes:
            clips.append(_where(plan.rows_of(indexes), "clip_id", clip_ids))
            planned = _where(read_table(folder, plan.videos_name), "status", pa.array(["planned"]))
            videos.append(_where(planned, "video_id", clips[-1]["video_id"]))
    together = pa.concat_tables(clip.cast(PLAN_SCHEMA) for clip in clips)
    if together.num_rows != len(failed):
        raise CacheError(
            f"{folder.url}: {len(failed)} clips failed, the plans have {together.num_rows} of them: tokenmill verify"
            f" --deep names what is damaged"
        )
    together = together.sort_by([("video_id", "ascending"), ("start_s", "ascending")])
    # What failed gives no hint of what it costs: all count alike.
    costs = together.append_column(COST_SCHEMA.field("cost"), pa.array([1] * together.num_rows, pa.int64()))
    return PlanTables(
        videos=pa.concat_tables(video.cast(VIDEO_SCHEMA) for video in videos).sort_by("video_id"),
        clips=cut_shards(costs, recipe, salt=f"retry {number}\n"),
        stamps=STAMP_SCHEMA.empty_table(),
    )


def _where(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The rows of `table` whose `column` is one of `values`."""
    return table.filter(pc.is_in(table[column], value_set=values))  # pyright: ignore[reportAttributeAccessIssue]
