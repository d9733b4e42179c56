"""Files of masks: exact, ordinary Parquet, small, and damage is noticed."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.mask_file import MaskFile, MaskRow, PackedMasks, trajectories_of, write_mask_file
from tokenmill.pipeline.segment import masks_of
from tokenmill.schemas.errors import CacheError

SPEC = {"name": "fake", "options": {"side": 3}}


def row_of(number: int, num_tracks: int = 9) -> MaskRow:
    small = np.random.default_rng(number).integers(0, num_tracks + 1, (4, 7, 9))
    masks = masks_of(small.repeat(4, 1).repeat(4, 2), 3, 400)
    clip = {"clip_id": f"{number:032x}", "video_id": "v", "num_valid": 3, "frame_pts_s": (0.0, 0.5, 1.0), "end_s": 1.25}
    return MaskRow(
        clip=clip, masks=PackedMasks.pack(masks), trajectory_ids=[f"a-{i}" for i in range(len(masks.graph_MT))]
    )


def written(tmp_path: Path, rows: list[MaskRow]) -> Path:
    path = tmp_path / "masks.parquet"
    write_mask_file(str(path), rows, SPEC, {"tokenmill.fingerprint": "f"})
    return path


def test_masks_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row_of(n, num_tracks=40 * n) for n in range(150)]  # none, more than 255, and several row groups
    file = MaskFile(written(tmp_path, rows).read_bytes(), "file")
    assert file.num_rows == 150
    assert file.spec.options == {"side": 3}
    for number in (149, 0, 1, 77, 64, 63):
        read, row = file.read(number), rows[number]
        masks = row.masks.unpack()
        np.testing.assert_array_equal(read.masks_THW, masks.masks_THW)
        np.testing.assert_array_equal(read.graph_MT, masks.graph_MT)
        assert read.num_valid == 3
    with pytest.raises(IndexError, match="has 150 rows, asked for 150"):
        file.read(150)


def test_trajectories_last_until_the_next_frame_is_shown(tmp_path: Path) -> None:
    tracks = np.zeros((4, 8, 8), int)
    tracks[1:3, :4] = 5
    tracks[0, 6:] = 9
    tracks[2:, 6:] = 9
    row = MaskRow(clip=row_of(0).clip, masks=PackedMasks.pack(masks_of(tracks, 3, 128)), trajectory_ids=["x", "y"])
    first, second = trajectories_of(row)
    assert first == {
        "trajectory_id": "x", "area": 62, "first_frame": 1, "last_frame": 2, "num_frames": 2,
        "start_s": 0.5, "end_s": 1.25,
    }  # fmt: skip
    again = MaskRow(clip=row.clip | {"frame_pts_s": (0.0, 0.5, 0.5)}, masks=row.masks, trajectory_ids=["x", "y"])
    assert [one["end_s"] for one in trajectories_of(again)] == [1.25, 1.25]  # a frame that is taken twice
    assert (second["num_frames"], second["area"], second["start_s"], second["end_s"]) == (2, 32, 0.0, 1.25)
    table = duckdb.sql(f"select unnest(trajectories, recursive := true) from '{written(tmp_path, [row])}'").fetchall()
    assert table[0] == tuple(first.values())


def test_a_damaged_row_is_named_and_others_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, [row_of(n) for n in range(100)])
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(pq.ParquetFile(path).metadata.num_columns - 1)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file = MaskFile(bytes(data), "file")
    file.read(0)
    with pytest.raises(CacheError, match=r"file: row 99 is damaged .*: tokenmill verify CACHE --deep --repair makes"):
        file.read(99)


def test_other_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pq.read_table(written(tmp_path, [row_of(0)])).select(["clip_id"]).replace_schema_metadata(), tmp_path / "b"
    )
    with pytest.raises(CacheError, match="no segmenter in its footer, so it is not a file of masks"):
        MaskFile((tmp_path / "b").read_bytes(), "b")
    with pytest.raises(CacheError, match="not a readable Parquet file"):
        MaskFile(b"PAR1", "b")
