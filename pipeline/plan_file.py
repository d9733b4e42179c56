"""Plans as files of a cache: immutable, numbered, and read one shard at a time.

A plan is two content-named files and a record that is created if it is absent. Whoever makes plan n has seen plans
1 to n-1, so no clip is planned twice however many jobs plan at once: the loser of a number looks again.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..schemas.clip import Clip, Video
from ..schemas.errors import CacheError
from ..schemas.plan import PLAN_FOLDER, PLAN_REMEDY, PlanRecord, plan_number
from ..schemas.shard import ShardPlan
from ..schemas.tables import PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA, with_format
from .plan import PlanTables
from .storage import Folder, storage_errors

CLIPS_PREFIX = f"{PLAN_FOLDER}/clips"
VIDEOS_PREFIX = f"{PLAN_FOLDER}/videos"
STAMPS = f"{PLAN_FOLDER}/stamps.parquet"


def write_plan(
    folder: Folder, tables: PlanTables, *, number: int = 1, retries: Mapping[str, str] | None = None
) -> "Plan | None":
    """Commit a plan as the cache's plan `number`; None where another job was first: look again at what there is.

    `retries` as in PlanRecord.
    """
    with folder.staging() as staging, storage_errors(staging):
        videos_path, clips_path = f"{staging}/videos.parquet", f"{staging}/clips.parquet"
        pq.write_table(tables.videos.cast(with_format(VIDEO_SCHEMA)), videos_path, compression="zstd")
        schema = with_format(PLAN_SCHEMA)
        with pq.ParquetWriter(clips_path, schema, compression="zstd") as writer:
            for start, length in _runs(tables.clips["shard_id"]):
                writer.write_table(tables.clips.slice(start, length).cast(schema), row_group_size=length)
        record = PlanRecord(
            number=number,
            clips=folder.publish(clips_path, CLIPS_PREFIX, tables.clips.num_rows),
            videos=folder.publish(videos_path, VIDEOS_PREFIX, tables.videos.num_rows),
            retries=retries or {},
        )
    return Plan(folder, record) if folder.create(record.name, record.to_json()) else None


def _runs(shard_ids: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Start and length of every run of equal values."""
    encoded = pc.run_end_encode(shard_ids.combine_chunks())  # pyright: ignore[reportAttributeAccessIssue]
    start = 0
    for end in encoded.run_ends.to_pylist():
        yield start, end - start
        start = end


class Plan:
    """One plan of a cache. Shards are read one at a time, so its size does not matter."""

    def __init__(self, folder: Folder, record: PlanRecord) -> None:
        self.record = record
        self._folder = folder

    @property
    def name(self) -> str:
        """The file of its clips."""
        return self.record.clips.name

    @property
    def videos_name(self) -> str:
        """The file of its videos."""
        return self.record.videos.name

    @property
    def num_clips(self) -> int:
        """How many clips it holds."""
        return self.record.clips.num_rows

    @property
    def is_retry(self) -> bool:
        """Whether its clips are those of earlier plans, tried again."""
        return bool(self.record.retries)

    def covers(self, product: str, fingerprint: str) -> bool:
        """Whether its shards are to be made of this product version."""
        return not self.is_retry or self.record.retries.get(product) == fingerprint

    def shards(self) -> list[tuple[str, int]]:
        """Id and number of clips of every shard, in order, from the footer alone."""
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        return [(str(group.column(0).statistics.min), group.num_rows) for group in groups]

    def shard(self, index: int) -> ShardPlan:
        """The shard at `index`."""
        rows = self.rows_of([index])
        return ShardPlan(shard_id=rows["shard_id"][0].as_py(), clips=clips_of(rows))

    def rows_of(self, indexes: Sequence[int]) -> pa.Table:
        """The rows (PLAN_SCHEMA) of the shards at `indexes`."""
        with _opened(self._folder, self.name, self._metadata) as parquet:  # a footer may be of very many shards
            return parquet.read_row_groups(indexes)

    @cached_property
    def clip_ids(self) -> list[tuple[str, ...]]:
        """The ids of the clips of every shard, in order: for retries, which are small."""
        with _opened(self._folder, self.name, self._metadata) as parquet:
            ids = parquet.read(columns=["clip_id"])["clip_id"].to_pylist()
        ends, clip_ids = 0, []
        for _, num_clips in self.shards():
            clip_ids.append(tuple(ids[ends : ends + num_clips]))
            ends += num_clips
        return clip_ids

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        with _opened(self._folder, self.name) as parquet:
            return parquet.metadata


@contextlib.contextmanager
def _opened(folder: Folder, name: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the plan folder, its footer read unless given; CacheError where it is damaged."""
    try:
        with folder.open(name) as stream:
            yield pq.ParquetFile(stream, metadata=metadata)
    except (pa.ArrowException, KeyError) as error:
        raise CacheError(f"{folder.uri(name)}: damaged ({' '.join(str(error).split())}): {PLAN_REMEDY}") from None


def clips_of(table: pa.Table) -> tuple[Clip, ...]:
    """The clips in rows of PLAN_SCHEMA; those of one video share its value."""
    rows = table.to_pylist()
    videos = {
        row["video_id"]: Video(uri=row["uri"], size_bytes=row["size_bytes"], digest=row["video_id"]) for row in rows
    }
    return tuple(
        Clip(
            clip_id=row["clip_id"],
            video=videos[row["video_id"]],
            start_s=row["start_s"],
            end_s=row["end_s"],
            frame_pts_s=tuple(row["frame_pts_s"]),
        )
        for row in rows
    )


def plan_names(folder: Folder) -> list[str]:
    """The records of all plans of a cache, in the order of their numbers."""
    numbers = {name: plan_number(name) for name in folder.list(PLAN_FOLDER)}
    return sorted((name for name, number in numbers.items() if number), key=lambda name: numbers[name] or 0)


def plans_of(folder: Folder) -> list[Plan]:
    """Every plan of a cache, in the order of their numbers."""
    return read_plans(folder, plan_names(folder))


def read_plans(folder: Folder, names: Sequence[str]) -> list[Plan]:
    """The plans of these records; CacheError where one is damaged."""
    return [Plan(folder, PlanRecord.from_json(folder.read(name), folder.uri(name))) for name in names]


def next_number(plans: Sequence[Plan]) -> int:
    """The number of the plan that comes after `plans`."""
    return plans[-1].record.number + 1 if plans else 1


def read_table(folder: Folder, name: str) -> pa.Table:
    """A table of the plan folder, whole; CacheError where it is damaged."""
    with _opened(folder, name) as parquet:
        return parquet.read()


def read_stamps(folder: Folder) -> pa.Table | None:
    """What sources said when their videos were read; None where that is not known, or no longer legible."""
    if not folder.exists(STAMPS):
        return None
    try:
        return read_table(folder, STAMPS)
    except CacheError:
        return None


def unseen(listing: pa.Table, stamps: pa.Table | None) -> pa.Table:
    """The rows of `listing` that `stamps` does not know with the same stamp."""
    if stamps is None or not stamps.num_rows:
        return listing
    return listing.join(stamps.select(["uri", "stamp"]), keys=["uri", "stamp"], join_type="left anti").sort_by("uri")


def forget(stamps: pa.Table | None, uris: Collection[str]) -> pa.Table | None:
    """`stamps` without those of `uris`, so that they are read again."""
    if stamps is None or not uris:
        return stamps
    listed = pc.is_in(stamps["uri"], value_set=pa.array(sorted(uris), pa.string()))  # pyright: ignore[reportAttributeAccessIssue]
    return stamps.filter(pc.invert(listed))  # pyright: ignore[reportAttributeAccessIssue]


def remember_stamps(folder: Folder, old: pa.Table | None, new: pa.Table) -> None:
    """Keep what was read, so that a second run need not read it again."""
    if not new.num_rows:
        return
    if old is not None:
        kept = old.join(new.select(["uri"]), keys=["uri"], join_type="left anti").select(STAMP_SCHEMA.names)
        new = pa.concat_tables([kept.cast(STAMP_SCHEMA), new])
    sink = pa.BufferOutputStream()
    pq.write_table(new.sort_by("uri").cast(with_format(STAMP_SCHEMA)), sink, compression="zstd")
    folder.replace(STAMPS, sink.getvalue().to_pybytes())
