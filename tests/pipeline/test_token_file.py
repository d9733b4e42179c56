"""Token files: exact, mappable, ordinary Parquet, and damage is noticed."""

import mmap
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.token_file import (
    HIGH,
    LOW,
    TokenFile,
    TokenLayout,
    from_planes,
    levels_of,
    to_planes,
    write_token_file,
)
from tokenmill.schemas.errors import CacheError

CODEBOOKS = [2, 256, 32768, 65536, 65537, 1 << 18, 1 << 19, 1 << 22, 1 << 25]


def codes(layout: TokenLayout, num_clips: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.integers(0, layout.codebook_size or 0, (num_clips, *layout.shape))
    values.flat[0], values.flat[-1] = 0, (layout.codebook_size or 0) - 1
    return values


def ids(num_clips: int) -> pa.Table:
    return pa.table({"clip_id": [f"{i:032x}" for i in range(num_clips)]})


def opened(path: Path) -> TokenFile:
    with open(path, "rb") as stream:
        return TokenFile(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), str(path))


@pytest.mark.parametrize("codebook_size", CODEBOOKS)
def test_codes_come_back_exactly_for_every_codebook_size(tmp_path: Path, codebook_size: int) -> None:
    layout = TokenLayout(dtype="uint16", shape=(3, 5, 7), codebook_size=codebook_size)
    values = codes(layout, 50)
    write_token_file(str(tmp_path / "a.parquet"), ids(50), values, layout, {"tokenmill.fingerprint": "f"})
    file = opened(tmp_path / "a.parquet")
    rows = np.random.default_rng(1).integers(0, 50, 80)
    assert np.array_equal(file.read(rows), values[rows])
    assert (file.layout, file.fingerprint, file.is_direct) == (layout, "f", True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    layout = TokenLayout(dtype=dtype, shape=(2, 3, 3, 4), codebook_size=None)
    rng = np.random.default_rng(0)
    kind = np.int16 if dtype == "bfloat16" else dtype
    values = rng.standard_normal((20, *layout.shape)).astype("float32").astype(kind)
    write_token_file(str(tmp_path / "a.parquet"), ids(20), values, layout, {})
    read = opened(tmp_path / "a.parquet").read(range(20))
    assert read.dtype == kind
    assert np.array_equal(read, values)


ONE_GRID, OWN_GRIDS = [(3, 4, 5)] * 4, [(5, 8, 8), (3, 4, 4), (3, 2, 2), (3, 2, 2)]


@pytest.mark.parametrize("grids", [ONE_GRID, OWN_GRIDS])
def test_levels_have_columns_of_their_own(tmp_path: Path, grids: list[tuple[int, int, int]]) -> None:
    layout = TokenLayout.of_levels(grids, 1 << 16)
    values = codes(layout, 20)
    write_token_file(str(tmp_path / "a.parquet"), ids(20), values, layout, {})
    file = opened(tmp_path / "a.parquet")
    assert (file.layout, file.is_direct) == (layout, True)
    assert np.array_equal(file.read([19, 3]), values[[19, 3]])
    table = pq.read_table(tmp_path / "a.parquet")
    for n, level in enumerate(levels_of(values, layout), start=1):
        assert b"".join(table[f"level_{n}"].to_pylist()) == level.astype("<u2").tobytes()
    assert sum(layout.widths.values()) == 2 * layout.num_values == 2 * layout.num_tokens
    two = layout.first_levels(2)
    first = from_planes(file.read_planes(np.arange(20), two), two)
    wanted = levels_of(values, layout)[:2]
    assert all(np.array_equal(a, b) for a, b in zip(levels_of(first, two), wanted, strict=True))
    assert len(layout.shape) == len(two.shape)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_first_levels_touch_no_other_bytes(tmp_path: Path, count: int) -> None:
    layout = TokenLayout.of_levels(ONE_GRID, 1 << 16)
    values, path = codes(layout, 20), tmp_path / "a.parquet"
    write_token_file(str(path), ids(20), values, layout, {})
    group, data = pq.read_metadata(path).row_group(0), bytearray(path.read_bytes())
    for n in range(count, 4):  # everything of the others is destroyed
        chunk = group.column(1 + n)
        data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
            b"\xff" * chunk.total_compressed_size
        )
    path.write_bytes(data)
    first = layout.first_levels(count)
    found = from_planes(opened(path).read_planes(np.arange(20), first), first)
    assert np.array_equal(found, values[..., :count])
    if count < 4:
        with pytest.raises(CacheError, match=f"column level_{count + 1} is damaged"):
            opened(path).read([0])


def test_levels_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="of up to 65,536 codes"):
        TokenLayout.of_levels(ONE_GRID, (1 << 16) + 1)
    with pytest.raises(ValueError, match="one level or more"):
        TokenLayout.of_levels([], 16)
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 levels can be taken"):
            TokenLayout.of_levels(ONE_GRID, 16).first_levels(count)


def test_eighteen_bit_codes_cost_eighteen_bits(tmp_path: Path) -> None:
    layout = TokenLayout(dtype="uint16", shape=(4, 32, 32), codebook_size=1 << 18)
    assert sum(layout.widths.values()) * 8 == 18 * 4096
    planes = to_planes(codes(layout, 2), layout)
    assert {name: plane.shape[1] for name, plane in planes.items()} == {LOW: 8192, HIGH: 1024}
    assert np.array_equal(from_planes(planes, layout), codes(layout, 2))


def test_codes_outside_the_codebook_are_refused() -> None:
    layout = TokenLayout(dtype="uint16", shape=(1, 1, 2), codebook_size=256)
    with pytest.raises(ValueError, match="codes reach from 0 to 256, the codebook has 256"):
        to_planes(np.array([[[[0, 256]]]]), layout)


def test_row_groups_are_a_few_megabytes_and_rows_cross_them(tmp_path: Path) -> None:
    layout = TokenLayout(dtype="uint16", shape=(16, 64, 64), codebook_size=65536)
    values = codes(layout, 100)
    write_token_file(str(tmp_path / "a.parquet"), ids(100), values, layout, {})
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 4
    rows = np.array([99, 0, 50, 31, 32, 63, 64, 99])
    assert np.array_equal(opened(tmp_path / "a.parquet").read(rows), values[rows])


def test_other_readers_see_ordinary_parquet(tmp_path: Path) -> None:
    layout = TokenLayout(dtype="uint16", shape=(2, 4, 4), codebook_size=32768)
    values = codes(layout, 10)
    path = str(tmp_path / "a.parquet")
    write_token_file(path, ids(10), values, layout, {})
    rows = duckdb.sql(f"select clip_id, tokens from '{path}' order by clip_id").fetchall()
    assert [row[0] for row in rows] == ids(10)["clip_id"].to_pylist()
    assert b"".join(row[1] for row in rows) == values.astype("<u2").tobytes()
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.num_rows == 10


def test_a_rewritten_file_is_read_the_ordinary_way(tmp_path: Path) -> None:
    layout = TokenLayout(dtype="uint16", shape=(2, 4, 4), codebook_size=1 << 18)
    values = codes(layout, 10)
    write_token_file(str(tmp_path / "a.parquet"), ids(10), values, layout, {})
    original = pq.ParquetFile(tmp_path / "a.parquet")
    metadata = {k: v for k, v in original.metadata.metadata.items() if k != b"ARROW:schema"}
    table = original.read().replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", row_group_size=3)
    file = opened(tmp_path / "b.parquet")
    assert not file.is_direct
    assert np.array_equal(file.read([9, 0, 4]), values[[9, 0, 4]])


@pytest.mark.parametrize("column", [LOW, HIGH])
def test_a_flipped_byte_is_noticed_on_first_touch(tmp_path: Path, column: str) -> None:
    layout = TokenLayout(dtype="uint16", shape=(2, 8, 8), codebook_size=1 << 18)
    path = tmp_path / "a.parquet"
    write_token_file(str(path), ids(10), codes(layout, 10), layout, {})
    metadata = pq.read_metadata(path).row_group(0)
    chunk = metadata.column([LOW, HIGH].index(column) + 1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CacheError, match=f"row group 0 of column {column} is damaged"):
        opened(path).read([0])
    assert len(opened(path).read([0], verify=False)) == 1


def test_what_is_not_a_token_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(ids(3), tmp_path / "plain.parquet")
    with pytest.raises(CacheError, match="no token layout in its footer"):
        opened(tmp_path / "plain.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 but no footer")
    with pytest.raises(CacheError, match="not a readable Parquet file"):
        opened(tmp_path / "torn.parquet")
    layout = TokenLayout(dtype="uint16", shape=(1, 1, 1), codebook_size=4)
    write_token_file(str(tmp_path / "a.parquet"), ids(2), np.zeros((2, 1, 1, 1), int), layout, {})
    with pytest.raises(IndexError, match="has 2 rows, asked for 0 to 2"):
        opened(tmp_path / "a.parquet").read([0, 2])
