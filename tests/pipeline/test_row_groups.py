"""Where tokens lie in files, and the digest of the rest."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenmill.pipeline.row_groups import ranges_between, read_row_groups, rest_digest
from tokenmill.pipeline.token_file import TokenLayout, write_token_file
from tokenmill.schemas.errors import CacheError

LAYOUT = TokenLayout(dtype="uint16", shape=(8, 32, 32), codebook_size=1 << 18)


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 18, (600, 8, 32, 32))


@pytest.fixture
def path(tmp_path: Path, codes: np.ndarray) -> str:
    rows = pa.table({"clip_id": [f"{i:032x}" for i in range(600)]})
    write_token_file(str(tmp_path / "a.parquet"), rows, codes, LAYOUT, {"tokenmill.fingerprint": "f"})
    return str(tmp_path / "a.parquet")


def test_row_groups_say_where_the_tokens_are(path: str, codes: np.ndarray) -> None:
    data = Path(path).read_bytes()
    groups = [group for group in read_row_groups(data, path) if group.column == "tokens"]
    assert len(groups) > 1
    found = b"".join(data[g.offset : (g.offset or 0) + g.size_bytes] for g in groups)
    assert found == (codes & 0xFFFF).astype("<u2").tobytes()
    assert [g.row_group for g in groups] == list(range(len(groups)))
    assert sum(g.num_rows for g in groups) == sum(g.num_values for g in groups) == 600


def test_the_rest_of_a_file_is_all_of_it_but_tokens(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    groups = read_row_groups(bytes(data), path)
    ranges = ranges_between([(g.offset or 0, g.size_bytes) for g in groups], len(data))
    assert sum(end - begin for begin, end in ranges) + sum(g.size_bytes for g in groups) == len(data)
    digest = rest_digest(path)
    assert digest == hashlib.sha256(b"".join(data[begin:end] for begin, end in ranges)).hexdigest()
    data[(groups[0].offset or 0) + 5] ^= 1
    Path(path).write_bytes(data)
    assert rest_digest(path) == digest
    data[10] ^= 1
    Path(path).write_bytes(data)
    assert rest_digest(path) != digest


def test_a_rewritten_file_has_no_places(path: str, tmp_path: Path) -> None:
    other = str(tmp_path / "b.parquet")
    pq.write_table(pq.read_table(path), other, compression="zstd")
    metadata = pq.read_metadata(path).metadata
    table = pq.read_table(path).replace_schema_metadata(metadata)
    pq.write_table(table, other, compression="zstd")
    data = Path(other).read_bytes()
    groups = read_row_groups(data, other)
    assert {(g.offset, g.crc32) for g in groups} == {(None, None)}
    assert rest_digest(other) == hashlib.sha256(data).hexdigest()


def test_narrow_tokens_have_one_page_to_a_row_group(tmp_path: Path) -> None:
    path = str(tmp_path / "narrow.parquet")
    layout = TokenLayout(dtype="uint16", shape=(1, 2, 2), codebook_size=1 << 16)
    values = np.random.default_rng(0).integers(0, 1 << 16, (40_000, 1, 2, 2))
    write_token_file(path, pa.table({"clip_id": [f"{i:032x}" for i in range(40_000)]}), values, layout, {})
    assert [group.num_rows for group in read_row_groups(Path(path).read_bytes(), path)] == [16_384, 16_384, 7_232]


def test_files_without_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clips.parquet"
    pq.write_table(pa.table({"a": [1]}, metadata={"tokenmill.format": "1"}), path)
    with pytest.raises(CacheError, match="neither a token layout nor an encoder in its footer"):
        read_row_groups(path.read_bytes(), str(path))
