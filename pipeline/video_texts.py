"""Captions and metadata of videos, which plans hold: looked up for a shard at a time."""

from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.clip import Clip
from ..schemas.shard import VideoText
from .plan_file import Plan, read_table
from .storage import Folder

PLANS_KEPT = 8


def texts_of(folder: Folder, plan: Plan, clips: Sequence[Clip]) -> dict[str, VideoText]:
    """Caption and metadata by video digest of those videos of `clips` that have any."""
    table = _planned_texts(folder, plan.videos_name)
    wanted = pa.array({clip.video.digest for clip in clips}, pa.string())
    rows = table.filter(pc.is_in(table["video_id"], value_set=wanted))  # pyright: ignore[reportAttributeAccessIssue]
    return {row["video_id"]: VideoText(caption=row["caption"], metadata=row["metadata"]) for row in rows.to_pylist()}


@lru_cache(maxsize=PLANS_KEPT)
def _planned_texts(folder: Folder, videos_name: str) -> pa.Table:
    """The texts of a plan's videos, read once: plan files never change. Duplicates have texts that are not used."""
    videos = read_table(folder, videos_name).select(["video_id", "caption", "metadata", "status"])
    has_text = (pc.field("status") == "planned") & (pc.field("caption").is_valid() | pc.field("metadata").is_valid())
    return videos.filter(has_text).drop_columns(["status"])
