"""Files of masks: one row per clip, masks packed without loss, trajectories as SQL can ask for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.errors import REPAIR_REMEDY, CacheError
from ..schemas.masks import ClipMasks, SegmenterSpec
from ..schemas.tables import FORMAT_KEY, MASK_SCHEMA, check_format, with_format
from .label_codec import pack_planes, unpack_planes
from .token_file import open_parquet

SEGMENTER = "tokenmill.segmenter"
ROWS_PER_GROUP = 64  # about 2 MB at 16x224x224


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMasks:
    """The masks of a clip in few bytes, as a file has them; `areas_MT` (int32) is of its real frames alone."""

    masks: bytes
    graph: bytes
    shape_thw: tuple[int, int, int]
    num_valid: int
    areas_MT: np.ndarray

    @classmethod
    def pack(cls, masks: ClipMasks) -> "PackedMasks":
        """The same masks packed."""
        num_frames, height, width = masks.masks_THW.shape
        return cls(
            masks=pack_planes(masks.masks_THW),
            graph=pack_planes(masks.graph_MT.astype(np.uint8)[None]),
            shape_thw=(num_frames, height, width),
            num_valid=masks.num_valid,
            areas_MT=masks.areas_MT[:, : masks.num_valid].astype(np.int32),
        )

    def unpack(self) -> ClipMasks:
        """The masks themselves."""
        graph_1MT = unpack_planes(self.graph, (1, len(self.areas_MT), self.shape_thw[0]))
        masks_THW = unpack_planes(self.masks, self.shape_thw)
        return ClipMasks(masks_THW=masks_THW, graph_MT=graph_1MT[0].astype(np.int64), num_valid=self.num_valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRow:
    """The masks of a clip on their way into a file, with the clip's own row and an id for every trajectory.

    An id is the same in all clips of a video in which the trajectory goes on.
    """

    clip: Mapping[str, Any]
    masks: PackedMasks
    trajectory_ids: Sequence[str]


def write_mask_file(path: str, rows: Sequence[MaskRow], spec: Mapping[str, Any], footer: Mapping[str, str]) -> None:
    """Write the masks of clips, made by the segmenter of `spec`, to a new local file, then check it."""
    schema = with_format(MASK_SCHEMA, **footer, **{SEGMENTER: json.dumps(spec, sort_keys=True)})
    table = pa.Table.from_pylist([_stored(row) for row in rows], schema=schema)
    packed = {"graph": "none", "masks": "none"}
    small = {field.name: "zstd" for field in MASK_SCHEMA if field.name not in packed}
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_PER_GROUP,
        compression=small | packed,  # pyright: ignore[reportArgumentType]
        use_dictionary=False,
        write_statistics=["clip_id", "video_id", "num_valid", "num_trajectories"],  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
    )
    with open(path, "rb") as stream:
        file = MaskFile(stream.read(), path)
    for number, row in enumerate(rows):
        found = file.stored(number)
        if (found["masks"], found["graph"]) != (row.masks.masks, row.masks.graph):
            raise CacheError(f"{path}: row {number} was not stored as written; check the disk")


def _stored(row: MaskRow) -> dict[str, Any]:
    masks, clip = row.masks, row.clip
    num_frames, height, width = masks.shape_thw
    return {
        **{name: clip[name] for name in ("clip_id", "video_id", "num_valid", "frame_pts_s")},
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "num_trajectories": len(masks.areas_MT),
        "trajectories": trajectories_of(row),
        "graph": masks.graph,
        "masks": masks.masks,
    }


def trajectories_of(row: MaskRow) -> list[dict[str, Any]]:
    """What SQL knows of each trajectory of a clip, of its real frames alone, as `schemas.tables.TRAJECTORY_TYPE`.

    It begins when its first frame is shown and ends when another frame than its last one is, or the clip ends.
    """
    times_s = [*row.clip["frame_pts_s"], row.clip["end_s"]]
    found = []
    for trajectory_id, areas_T in zip(row.trajectory_ids, row.masks.areas_MT, strict=True):
        frames = areas_T.nonzero()[0]
        found.append(
            {
                "trajectory_id": trajectory_id,
                "area": int(areas_T.sum()),
                "first_frame": int(frames[0]),
                "last_frame": int(frames[-1]),
                "num_frames": len(frames),
                "start_s": times_s[frames[0]],
                "end_s": next((later for later in times_s if later > times_s[frames[-1]]), times_s[-1]),
            }
        )
    return found


class MaskFile:
    """One file of masks, read through a buffer (a memory map, or bytes); its pages are checked as they are read."""

    def __init__(self, buffer: Any, name: str) -> None:
        self._name = name
        self._parquet = open_parquet(buffer, name)
        footer = self._parquet.schema_arrow.metadata or {}
        if SEGMENTER.encode() not in footer:
            raise CacheError(f"{name}: no segmenter in its footer, so it is not a file of masks")
        check_format(int(footer.get(FORMAT_KEY, b"0")), name)
        self.spec = SegmenterSpec(**json.loads(footer[SEGMENTER.encode()]))
        metadata = self._parquet.metadata
        self._group_ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        self.num_rows: int = metadata.num_rows
        self._last: tuple[int, list[dict[str, Any]]] = (-1, [])

    def read(self, row: int) -> ClipMasks:
        """The masks of one clip; CacheError where they are damaged."""
        try:
            stored = self.stored(row)
            shape = stored["num_frames"], stored["height"], stored["width"]
            graph = unpack_planes(stored["graph"], (1, stored["num_trajectories"], stored["num_frames"]))[0]
            masks_THW = unpack_planes(stored["masks"], shape)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CacheError(f"{self._name}: row {row} is damaged ({error}): {REPAIR_REMEDY}") from None
        return ClipMasks(masks_THW=masks_THW, graph_MT=graph.astype(np.int64), num_valid=stored["num_valid"])

    def stored(self, row: int) -> dict[str, Any]:
        """The columns of one clip that its masks take, as they are in the file."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self._name} has {self.num_rows} rows, asked for {row}")
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        return self._rows(group)[row - (int(self._group_ends[group - 1]) if group else 0)]

    def _rows(self, group: int) -> list[dict[str, Any]]:
        """The rows of a row group; those of the last one are kept."""
        last = self._last  # other threads may read other groups meanwhile
        if last[0] != group:
            columns = ["num_valid", "num_frames", "height", "width", "num_trajectories", "graph", "masks"]
            rows = self._parquet.read_row_group(group, columns=columns, use_threads=False).to_pylist()
            self._last = (group, rows)
            return rows
        return last[1]
