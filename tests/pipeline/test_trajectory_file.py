"""Files of trajectory tokens: exact, mappable, ordinary Parquet, and damage is noticed."""

import mmap
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.token_file import LOW, TokenLayout
from tokenmill.pipeline.trajectory_file import TrajectoryFile, write_trajectory_file
from tokenmill.schemas.errors import CacheError
from tokenmill.schemas.tokens import TrajectoryTokens

KINDS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}


def clip_of(number: int, dtype: str = "float16", dim: int = 16) -> TrajectoryTokens:
    random = np.random.default_rng(number)
    num = int(random.integers(1, 40))
    values = random.standard_normal((num, dim)).astype("f4")
    return TrajectoryTokens(
        values_Nd=(values * 1000).astype("<i2") if dtype == "bfloat16" else values.astype(KINDS[dtype]),
        slots_N=np.sort(random.choice(128, num, replace=False)),
        chunks_N=np.zeros(num, np.int64),
        trajectories_N=np.arange(num),
        assignment_Thw=random.integers(0, 128, (2, 7, 7), dtype=np.uint8),
        chunk_frames=2,
        num_valid=2,
        mass_N=None if number % 2 else random.random(num, dtype=np.float32),
    )


def written(path: Path, clips: list[TrajectoryTokens], dtype: str = "float16") -> Path:
    layout = TokenLayout(dtype=dtype, shape=clips[0].values_Nd.shape[1:], codebook_size=None)
    ids = [f"{i:032x}" for i in range(len(clips))]
    write_trajectory_file(str(path), ids, clips, layout, {"tokenmill.fingerprint": "f"})
    return path


def opened(path: Path) -> TrajectoryFile:
    with open(path, "rb") as stream:
        return TrajectoryFile(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def assert_same(read: TrajectoryTokens, clip: TrajectoryTokens) -> None:
    assert read.values_Nd.dtype == clip.values_Nd.dtype
    for name in ("values_Nd", "slots_N", "chunks_N", "trajectories_N", "assignment_Thw"):
        np.testing.assert_array_equal(getattr(read, name), getattr(clip, name))
    assert (read.mass_N is None) == (clip.mass_N is None)
    if clip.mass_N is not None:
        np.testing.assert_array_equal(read.mass_N, clip.mass_N)


@pytest.mark.parametrize("dtype", KINDS)
def test_tokens_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    clips = [clip_of(i, dtype) for i in range(30)]
    file = opened(written(tmp_path / "a.parquet", clips, dtype))
    assert file.is_direct
    for row in (29, 0, 13, 13):
        assert_same(file.read(row), clips[row])


def test_files_of_many_row_groups_are_read_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.pipeline.trajectory_file.ROW_GROUP_BYTES", 2000)
    clips = [clip_of(i) for i in range(100)]
    path = written(tmp_path / "a.parquet", clips)
    assert pq.ParquetFile(path).num_row_groups > 10
    file = opened(path)
    for row, clip in enumerate(clips):
        assert_same(file.read(row), clip)
    with pytest.raises(IndexError, match="has 100 rows, asked for -1"):
        file.read(-1)


def test_other_readers_see_lists_of_tokens(tmp_path: Path) -> None:
    clips = [clip_of(i) for i in range(3)]
    path = written(tmp_path / "a.parquet", clips)
    rows = duckdb.sql(f"select num_tokens, slots, tokens from '{path}' order by clip_id").fetchall()
    for (num, slots, tokens), clip in zip(rows, clips, strict=True):
        assert (num, slots) == (len(clip.slots_N), clip.slots_N.tolist())
        assert b"".join(tokens) == clip.values_Nd.tobytes()


def test_a_file_that_was_rewritten_by_others_is_still_read(tmp_path: Path) -> None:
    clips = [clip_of(i) for i in range(9)]
    table = pq.read_table(written(tmp_path / "a.parquet", clips))
    footer = pq.ParquetFile(tmp_path / "a.parquet").metadata.metadata
    pq.write_table(table.replace_schema_metadata(footer), tmp_path / "b.parquet", compression="zstd")
    file = opened(tmp_path / "b.parquet")
    assert not file.is_direct
    assert_same(file.read(7), clips[7])


def test_a_flipped_byte_is_noticed_unless_nobody_asks(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", [clip_of(i) for i in range(9)])
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith(LOW))
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    with pytest.raises(CacheError, match="row group 0 of column tokens is damaged"):
        TrajectoryFile(bytes(data), "a").read(8)
    TrajectoryFile(bytes(data), "a").read(8, verify=False)
    slots = next(
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith("slots")
    )
    data[slots.data_page_offset + slots.total_compressed_size - 3] ^= 1
    with pytest.raises(CacheError, match=r"a: row group 0 is damaged \(.*--deep --repair makes it again"):
        TrajectoryFile(bytes(data), "a").read(8)
