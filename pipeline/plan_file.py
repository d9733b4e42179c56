"""Plans as files of a cache: immutable, named by their content, and read one shard at a time."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.clip import Clip, Video
from ..schemas.digest import digest_of_stream
from ..schemas.errors import CacheError
from ..schemas.shard import SHORT_DIGEST, ShardPlan
from ..schemas.tables import PLAN_SCHEMA, STAMP_SCHEMA, VIDEO_SCHEMA, with_format
from .plan import PlanTables
from .storage import Folder, storage_errors

PLAN_FOLDER = "plan"
CLIPS_PREFIX = f"{PLAN_FOLDER}/clips"
VIDEOS_PREFIX = f"{PLAN_FOLDER}/videos"
STAMPS = f"{PLAN_FOLDER}/stamps.parquet"
VIDEOS_KEY = b"tokenmill.videos"


def write_plan(folder: Folder, tables: PlanTables) -> str:
    """Publish a plan into a cache; returns the name of its clips file."""
    with folder.staging() as staging, storage_errors(staging):
        videos_path, clips_path = f"{staging}/videos.parquet", f"{staging}/clips.parquet"
        pq.write_table(tables.videos.cast(with_format(VIDEO_SCHEMA)), videos_path, compression="zstd")
        videos = folder.publish(videos_path, VIDEOS_PREFIX, tables.videos.num_rows)
        schema = with_format(PLAN_SCHEMA, **{VIDEOS_KEY.decode(): videos.name})
        with pq.ParquetWriter(clips_path, schema, compression="zstd") as writer:
            for start, length in _runs(tables.clips["shard_id"]):
                writer.write_table(tables.clips.slice(start, length).cast(schema), row_group_size=length)
        return folder.publish(clips_path, CLIPS_PREFIX, tables.clips.num_rows).name


def _runs(shard_ids: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Start and length of every run of equal values."""
    encoded = pa.compute.run_end_encode(shard_ids.combine_chunks())  # pyright: ignore
    start = 0
    for end in encoded.run_ends.to_pylist():
        yield start, end - start
        start = end


class Plan:
    """One plan file of a cache. Shards are read one at a time, so its size does not matter."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.name = name
        self._folder = folder
        with _opened(folder, name) as parquet:
            self._metadata = parquet.metadata
            self.videos_name = (parquet.schema_arrow.metadata or {})[VIDEOS_KEY].decode()
        self.num_clips: int = self._metadata.num_rows

    def shards(self) -> list[tuple[str, int]]:
        """Id and number of clips of every shard, in order, from the footer alone."""
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        return [(str(group.column(0).statistics.min), group.num_rows) for group in groups]

    def shard(self, index: int) -> ShardPlan:
        """The shard at `index`."""
        with _opened(self._folder, self.name) as parquet:
            rows = parquet.read_row_group(index)
        return ShardPlan(shard_id=rows["shard_id"][0].as_py(), clips=clips_of(rows))

    def problems(self) -> Iterator[str]:
        """One line for each of its files whose bytes are not what its name says."""
        for name in (self.name, self.videos_name):
            with self._folder.open(name) as stream:
                sha256, _ = digest_of_stream(stream)
            if not name.endswith(f"-{sha256[:SHORT_DIGEST]}.parquet"):
                yield f"{name}: damaged, its SHA-256 begins with {sha256[:SHORT_DIGEST]}; {PLAN_REMEDY}"


PLAN_REMEDY = "delete the plan folder and run the recipe again: the same videos give the same plan"


@contextlib.contextmanager
def _opened(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the plan folder; CacheError where it is damaged."""
    try:
        with folder.open(name) as stream:
            yield pq.ParquetFile(stream)
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


def plans_of(folder: Folder) -> list[Plan]:
    """Every plan of a cache, by name."""
    names = folder.list(PLAN_FOLDER)
    return [Plan(folder, name) for name in names if name.startswith(f"{CLIPS_PREFIX}-")]


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
