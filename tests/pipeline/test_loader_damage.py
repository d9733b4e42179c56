"""Loaders find every damaged byte of what they read, say where it is, and go on without it when they are asked to."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.dataset import TokenDataset
from tokenmill.pipeline.loader import TokenLoader
from tokenmill.schemas.errors import CacheError, StorageError

from .loader_kit import CLIPS, CLIPS_PER_SHARD, assert_right, copied, flat, ids_of, make_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = make_cache(str(tmp_path_factory.mktemp("damage") / "cache"))
    open_cache(url).sql("select 1 as x")
    return url


@pytest.fixture
def copy(made: str, tmp_path: Path) -> Path:
    return copied(made, tmp_path)


def file_of(copy: Path, product: str, number: int = 0) -> Path:
    return sorted((copy / "tokens" / product).iterdir())[number]


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("product", ["short", "long", "tracks"])
def test_a_flipped_byte_anywhere_in_a_token_file_is_found(copy: Path, product: str) -> None:
    cache = open_cache(str(copy))
    path = file_of(copy, product, 1)
    size = path.stat().st_size
    places = {0, 3, 4, 5, size - 1, size - 5, size - 9, *np.random.default_rng(0).integers(0, size, 60).tolist()}
    for place in places:
        flip(path, place)
        with pytest.raises(CacheError, match=rf"{path.name}: .*verify CACHE --deep --repair"):
            list(TokenLoader(cache, product, 64))
        flip(path, place)
    assert sum(len(ids) for ids in ids_of(TokenLoader(cache, product, 64))) == CLIPS


def test_the_error_names_file_and_row_group(copy: Path) -> None:
    cache = open_cache(str(copy))
    group = cache.sql("from row_groups where name like 'tokens/long/%' and row_group = 2 limit 1").to_pylist()[0]
    flip(copy / group["name"], group["offset"] + 7)
    message = rf"{group['name']}: row group 2 of column {group['column']} is damaged \(its CRC-32 does not match\)"
    with pytest.raises(CacheError, match=message):
        list(TokenLoader(cache, "long", 64))
    dataset = TokenDataset(cache, "long")
    with pytest.raises(CacheError, match=message):
        [dataset[i] for i in range(len(dataset))]
    assert sum(len(ids) for ids in ids_of(TokenLoader(cache, "long", 64, verify=False))) == CLIPS


@pytest.mark.parametrize("product", ["short", "tracks"])
def test_damaged_clips_are_left_out_and_counted_when_asked(copy: Path, product: str) -> None:
    cache = open_cache(str(copy))
    names = ["half", product]
    whole = ids_of(TokenLoader(cache, names, 50, seed=3))
    group = cache.sql(f"from row_groups where name like 'tokens/{product}/%' and row_group = 1 limit 1").to_pylist()[0]
    flip(copy / group["name"], group["offset"])
    loader = TokenLoader(cache, names, 50, seed=3, on_damage="skip")
    batches = list(loader)
    assert loader.num_skipped == group["num_rows"]
    assert len(batches) == len(whole)  # the same steps, so that ranks stay together
    for batch, ids in zip(batches, whole, strict=True):
        assert [one for one in ids if one in set(batch["clip_id"])] == batch["clip_id"]
        assert_right(cache, {name: batch[name] for name in ("clip_id", "half")})
    missing = set(flat(whole)) - set(flat(ids_of(batches)))
    assert len(missing) == group["num_rows"]
    assert {i for ids in ids_of(loader) for i in ids} | missing == set(flat(whole))
    assert loader.num_skipped == 2 * group["num_rows"]


def test_a_file_of_another_size_is_damaged_and_an_absent_one_is_an_error(copy: Path) -> None:
    cache = open_cache(str(copy))
    path = file_of(copy, "short", 2)
    rows = pq.read_metadata(path).num_rows
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CacheError, match=r"bytes, committed \d+: tokenmill verify CACHE --deep --repair"):
        list(TokenLoader(cache, "short", 64))
    loader = TokenLoader(cache, "short", 64, on_damage="skip")
    assert sum(len(ids) for ids in ids_of(loader)) == CLIPS - rows
    path.unlink()
    with pytest.raises(StorageError, match="no such file"):
        list(TokenLoader(cache, "short", 64, on_damage="skip"))


def test_files_that_another_tool_has_rewritten_are_read_from_the_local_cache(made: str, tmp_path: Path) -> None:
    copy = copied(made, tmp_path)
    (copy / "index.duckdb").unlink()
    original = open_cache(made)
    for product in ("short", "long", "tracks"):
        path = file_of(copy, product)
        metadata = pq.read_metadata(path).metadata
        table = pq.read_table(path)
        footer = {**(table.schema.metadata or {}), **metadata}
        pq.write_table(table.replace_schema_metadata(footer), path, compression="zstd", row_group_size=50)
    cache: TokenCache = open_cache(str(copy))
    for shuffle in ("none", "global"):
        ids = []
        for batch in TokenLoader(cache, ["tracks", "short", "long"], 64, shuffle=shuffle):
            assert_right(original, batch)
            ids += batch["clip_id"]
        assert len(set(ids)) == CLIPS
    dataset = TokenDataset(cache, ["short", "tracks"])
    assert torch.equal(dataset[3]["short"].int(), original.read("short", [dataset[3]["clip_id"]])[0])
    assert CLIPS_PER_SHARD > 50  # the rewritten file has several groups


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_clips_that_are_left_out_at_an_end_leave_ids_and_tokens_together(
    copy: Path, monkeypatch: pytest.MonkeyPatch, which: int, batch_size: int, *, is_mapped: bool
) -> None:
    cache = open_cache(str(copy))
    original = TokenDataset(cache, ["short", "tracks"])
    wanted = {sample["clip_id"]: sample for sample in (original[i] for i in range(len(original)))}
    groups = cache.sql("from row_groups where name like 'tokens/short/%' order by name, row_group").to_pylist()
    flip(copy / groups[which]["name"], groups[which]["offset"])
    if not is_mapped:  # as where there are very many files
        monkeypatch.setattr("tokenmill.pipeline.mapped_tokens.MappedTokens.is_steady", property(lambda self: False))
    loader = TokenLoader(cache, ["short", "tracks"], batch_size, shuffle="none", on_damage="skip")
    batches = list(loader)
    assert len(batches) == len(loader)
    assert loader.num_skipped == groups[which]["num_rows"]
    for batch in batches:
        cu_seqlens = batch["tracks"].cu_seqlens
        for i, clip_id in enumerate(batch["clip_id"]):
            assert torch.equal(batch["short"][i], wanted[clip_id]["short"])
            assert torch.equal(batch["tracks"].values[cu_seqlens[i] : cu_seqlens[i + 1]], wanted[clip_id]["tracks"])


def test_counts_that_are_damaged_are_not_believed(copy: Path) -> None:
    cache = open_cache(str(copy))
    path = file_of(copy, "tracks")
    data = path.read_bytes()
    table = pq.read_table(path)
    column = table.column_names.index("num_tokens")
    chunk = pq.read_metadata(path).row_group(0).column(column)
    found = 0
    for place in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size):
        flip(path, place)
        try:
            TokenLoader(cache, "tracks", 64, where=f"start_s > -{place}", verify=False)
        except CacheError as error:
            found += "a file is damaged" in str(error) or "query failed" in str(error)
        path.write_bytes(data)
    assert found > 0
    assert sum(len(ids) for ids in ids_of(TokenLoader(cache, "tracks", 64))) == CLIPS
