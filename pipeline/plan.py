"""The plan: videos -> clips -> shards, immutable and named by its content.

The same videos and recipe give the same bytes on any machine: rows are sorted by content digests, and shards
are cut by predicted cost, never by the number of workers. A cache may hold several plans, each adding the
videos that were new when it was made, or clips that are tried again (retry_plan).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ..schemas.digest import digest_of
from ..schemas.recipe import ClipsSection, Recipe
from ..schemas.tables import PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA
from .cut import Cut, cut_video
from .videos import VideoFacts, regular_pts_s

CHUNK_CLIPS = 65536
SETTLED = frozenset({"planned", "duplicate", "empty"})  # what is said once of a video, and never again
COST_SCHEMA = pa.schema([*PLAN_SCHEMA, pa.field("cost", pa.int64())])


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTables:
    """A plan in memory: `videos` (VIDEO_SCHEMA), `clips` (PLAN_SCHEMA, in shard order), and what was read when."""

    videos: pa.Table
    clips: pa.Table
    stamps: pa.Table


def make_plan(
    recipe: Recipe, facts: Iterable[VideoFacts], known: Mapping[tuple[str, str], str] | None = None
) -> PlanTables:
    """Cut the videos of `facts` (sorted by uri) into clips and shards.

    `known` gives the latest status of every (video_id, uri) that the cache's plans have: those are left out, unless
    they could not be read then, and can be now or fail in another way.
    """
    known = known or {}
    builder = _Builder(recipe)
    first_uri = {video_id: uri for (video_id, uri), status in known.items() if status == "planned"}
    for video in facts:
        builder.add_stamp(video)
        status_before = known.get((video.video_id, video.uri))
        if status_before in SETTLED or (video.pts_s is None and status_before == video.status):
            continue
        if video.video_id in first_uri:
            builder.add_video(video, status="duplicate", reason=f"same content as {first_uri[video.video_id]}")
        elif video.pts_s is None:
            first_uri[video.video_id] = video.uri
            builder.add_video(video, status=video.status, reason=video.reason)
        else:
            first_uri[video.video_id] = video.uri
            builder.add_clips(video, _cut(video, recipe.clips))
    return builder.finish()


def _cut(video: VideoFacts, clips: ClipsSection) -> Cut:
    assert video.pts_s is not None
    if video.is_regular and video.fps:
        return _cut_regular(len(video.pts_s), video.fps, clips)  # pyright: ignore[reportArgumentType]  it is hashable
    return cut_video(video.pts_s, video.end_s, clips)


@lru_cache(maxsize=64)
def _cut_regular(num_frames: int, fps: float, clips: ClipsSection) -> Cut:
    """Videos of one length and rate are cut alike: a table may list millions of them."""
    return cut_video(regular_pts_s(num_frames, fps), num_frames / fps, clips)


class _Builder:
    """Gathers rows in bounded chunks, then sorts them and cuts the shards."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._sampling_digest = digest_of(recipe.clips.model_dump(mode="json"))
        self._videos, self._video_batches = [], []
        self._stamps, self._stamp_batches = [], []
        self._cuts: list[tuple[VideoFacts, Cut]] = []
        self._num_waiting = 0
        self._clip_batches: list[pa.RecordBatch] = []

    def add_stamp(self, video: VideoFacts) -> None:
        """Remember what need not be read again: a failure may pass, poison stays poison until a retry is asked for."""
        if video.stamp and (video.pts_s is not None or video.status == "quarantined"):
            self._stamps.append({"uri": video.uri, "stamp": video.stamp, "video_id": video.video_id})
            _flush(self._stamps, self._stamp_batches, STAMP_SCHEMA, CHUNK_CLIPS)

    def add_video(self, video: VideoFacts, *, status: str, reason: str | None, cut: Cut | None = None) -> None:
        self._videos.append(
            {
                "video_id": video.video_id,
                "uri": video.uri,
                "size_bytes": None if video.size_bytes < 0 else video.size_bytes,
                "num_frames": None if video.pts_s is None else len(video.pts_s),
                "fps": video.fps,
                "width": video.width,
                "height": video.height,
                "duration_s": None if video.pts_s is None else video.end_s - float(video.pts_s[0]),
                "codec": video.codec,
                "caption": video.caption,
                "metadata": video.metadata,
                "num_clips": len(cut.starts_s_C) if cut else 0,
                "num_dropped_frames": cut.num_dropped if cut else 0,
                "status": status,
                "reason": reason,
                "attempts": video.attempts if status == video.status else None,
                "log_tail": video.log_tail or None,
            }
        )
        _flush(self._videos, self._video_batches, VIDEO_SCHEMA, CHUNK_CLIPS)

    def add_clips(self, video: VideoFacts, cut: Cut) -> None:
        if not len(cut.starts_s_C):
            reason = f"{cut.num_dropped} sampled frames, fewer than clips.num_frames={self._recipe.clips.num_frames}"
            self.add_video(video, status="empty", reason=f"{reason}, and clips.tail=drop", cut=cut)
            return
        self.add_video(video, status="planned", reason=None, cut=cut)
        self._cuts.append((video, cut))
        self._num_waiting += len(cut.starts_s_C)
        if self._num_waiting >= CHUNK_CLIPS:
            self._flush_clips()

    def finish(self) -> PlanTables:
        self._flush_clips()
        _flush(self._videos, self._video_batches, VIDEO_SCHEMA, 1)
        _flush(self._stamps, self._stamp_batches, STAMP_SCHEMA, 1)
        videos = pa.Table.from_batches(self._video_batches, VIDEO_SCHEMA)
        clips = pa.Table.from_batches(self._clip_batches, COST_SCHEMA)
        self._clip_batches.clear()
        clips = clips.sort_by([("video_id", "ascending"), ("start_s", "ascending")])
        return PlanTables(
            videos=videos.sort_by([("video_id", "ascending"), ("uri", "ascending")]),
            clips=cut_shards(clips, self._recipe),
            stamps=pa.Table.from_batches(self._stamp_batches, STAMP_SCHEMA),
        )

    def _flush_clips(self) -> None:
        if not self._cuts:
            return
        counts = [len(cut.starts_s_C) for _, cut in self._cuts]
        lengths = np.concatenate([np.diff(cut.offsets) for _, cut in self._cuts])
        times_s = np.concatenate([cut.times_s for _, cut in self._cuts])
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        clips = self._recipe.clips
        out_pixels = clips.num_frames * clips.height * clips.width
        costs = [
            cut.num_spanned_C * ((video.width or clips.width) * (video.height or clips.height)) + out_pixels
            for video, cut in self._cuts
        ]
        columns = {
            "shard_id": pa.array([""] * len(lengths)),
            "clip_id": pa.array(self._clip_ids()),
            "video_id": _repeated([video.video_id for video, _ in self._cuts], counts, pa.string()),
            "uri": _repeated([video.uri for video, _ in self._cuts], counts, pa.string()),
            "size_bytes": _repeated([video.size_bytes for video, _ in self._cuts], counts, pa.int64()),
            "start_s": pa.array(np.concatenate([cut.starts_s_C for _, cut in self._cuts])),
            "end_s": pa.array(np.concatenate([cut.ends_s_C for _, cut in self._cuts])),
            "frame_pts_s": pa.ListArray.from_arrays(offsets, times_s, type=PLAN_SCHEMA.field("frame_pts_s").type),
            "cost": pa.array(np.concatenate(costs).astype(np.int64)),
        }
        self._clip_batches.append(pa.RecordBatch.from_arrays(list(columns.values()), schema=COST_SCHEMA))
        self._cuts.clear()
        self._num_waiting = 0

    def _clip_ids(self) -> list[str]:
        """128 bits of SHA-256 over the video, the sampling, and span and times in microseconds.

        The span counts: two windows within one long-shown frame have the same times.
        """
        ids = []
        for video, cut in self._cuts:
            base = hashlib.sha256(f"{video.video_id}\n{self._sampling_digest}\n".encode())
            spans = _micros(np.stack([cut.starts_s_C, cut.ends_s_C], axis=1))
            times = _micros(cut.times_s)
            ends = (cut.offsets * 8).tolist()
            for i in range(len(ends) - 1):
                clip = base.copy()
                clip.update(spans[16 * i : 16 * i + 16])
                clip.update(times[ends[i] : ends[i + 1]])
                ids.append(clip.hexdigest()[:32])
        return ids


def _micros(times_s: np.ndarray) -> bytes:
    """Times as whole microseconds, little-endian 64 bits each."""
    return np.round(times_s * 1e6).astype("<i8").tobytes()


def _flush(rows: list[dict], batches: list[pa.RecordBatch], schema: pa.Schema, at_least: int) -> None:
    if len(rows) >= at_least:
        batches.append(pa.RecordBatch.from_pylist(rows, schema=schema))
        rows.clear()


def _repeated(values: list, counts: list[int], kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(values)), counts)))


def cut_shards(clips: pa.Table, recipe: Recipe, salt: str = "") -> pa.Table:
    """`clips` (COST_SCHEMA, sorted) as PLAN_SCHEMA: runs of about equal cost, about `shards.frames` frames on average.

    A shard's id digests its clips' ids, after `salt`.
    """
    num_clips = clips.num_rows
    if not num_clips:
        return clips.select(PLAN_SCHEMA.names)
    num_shards = max(1, round(num_clips * recipe.clips.num_frames / recipe.shards.frames))
    cost = np.cumsum(clips["cost"].to_numpy())
    targets = cost[-1] * np.arange(1, num_shards) // num_shards
    most_clips = max(1, 2 * recipe.shards.frames // recipe.clips.num_frames)
    ends = [*np.searchsorted(cost, targets).tolist(), num_clips]
    clip_ids = clips["clip_id"].to_pylist()
    shard_ids: list[str] = []
    lengths: list[int] = []
    start = 0
    for end in ends:
        # Cheap clips between dear ones would make a shard of many rows: its memory is bounded too.
        for stop in [*range(start + most_clips, end, most_clips), end] if end > start else []:
            digest = hashlib.sha256((salt + "\n".join(clip_ids[start:stop])).encode())
            shard_ids.append(digest.hexdigest()[:16])
            lengths.append(stop - start)
            start = stop
    return clips.select(PLAN_SCHEMA.names).set_column(
        0, PLAN_SCHEMA.field("shard_id"), _repeated(shard_ids, lengths, pa.string())
    )
