"""Macros over codes count what numpy counts."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.pipeline.code_statistics import create_code_macros
from tokenmill.schemas.cache_info import CacheInfo, ProductInfo
from tokenmill.schemas.errors import CacheError

from .test_cache import make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    url = str(tmp_path_factory.mktemp("codes") / "cache")
    make_cache(url)
    return open_cache(url)


def clip_ids(count: int) -> list[str]:
    """Ids of clips made up, in their order."""
    return [f"{number:032x}" for number in range(count)]


def connected(codes_Nn: np.ndarray, shape: tuple[int, ...], levels: Sequence = ()) -> duckdb.DuckDBPyConnection:
    """A connection to codes of a product `made`, as views give those of a cache, with the macros over them."""
    entry = ProductInfo(
        fingerprint="", tokenizer={"kind": "discrete", "codebook_size": 65536}, shape=shape, levels=tuple(levels)
    )
    connection = duckdb.connect()
    rows = pa.table(
        {
            "clip_id": clip_ids(len(codes_Nn)),
            "num_valid": pa.array([8] * len(codes_Nn), pa.uint32()),
            "codes": pa.array(codes_Nn.reshape(len(codes_Nn), -1).astype(np.int32).tolist(), pa.list_(pa.int32())),
        }
    )
    connection.register("tokens_made", rows)
    connection.execute("create temp view levels_made as select clip_id, num_valid, 1 as level, codes from tokens_made")
    connection.execute("create temp table products (product varchar, codebook_size int, shape int[], levels int[][])")
    connection.execute("insert into products values ('tokens/made', 65536, ?, ?)", [shape, list(levels) or None])
    create_code_macros(connection, CacheInfo(recipe={}, products={"tokens/made": entry}))
    return connection


def levels_of(cache: TokenCache, product: str) -> tuple[list[str], list[np.ndarray]]:
    """The clips of a cache, and their codes (N,t,h,w) of every level."""
    ids = cache.sql("select clip_id from clips order by clip_id")["clip_id"].to_pylist()
    if cache.info.products[f"tokens/{product}"].levels:
        return ids, [level.numpy() for level in cache.read_levels(product, ids)]
    return ids, [cache.read(product, ids).numpy()]


@pytest.mark.parametrize("product", ["fake", "dct", "levels", "native"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ngrams_are_windows_of_each_level_of_each_clip(cache: TokenCache, product: str, n: int) -> None:
    wanted: Counter = Counter()
    for number, level in enumerate(levels_of(cache, product)[1], start=1):
        for codes in level.reshape(len(level), -1):
            wanted.update((number, *window) for window in np.lib.stride_tricks.sliding_window_view(codes, n).tolist())
    rows = cache.sql(f"from code_ngrams('{product}', {n})").to_pylist()
    assert {(row["level"], *row["ngram"]): row["uses"] for row in rows} == wanted
    assert len(rows) == len(wanted)
    keys = [(-row["uses"], row["level"], row["ngram"]) for row in rows]
    assert all(one < other for one, other in pairwise(keys))


@pytest.mark.parametrize("n", [1, 5])
def test_other_lengths_of_ngrams_are_refused(cache: TokenCache, n: int) -> None:
    with pytest.raises(CacheError, match=rf"code_ngrams\(name, n\): n is 2, 3 or 4, found {n}"):
        cache.sql(f"from code_ngrams('fake', {n})")


def test_clips_shorter_than_an_ngram_have_none() -> None:
    made = connected(np.zeros((3, 2)), (1, 1, 2))
    assert made.sql("from code_ngrams('made', 3)").fetchall() == []
    assert made.sql("from code_ngrams('made', 2)").fetchall() == [(1, [0, 0], 3)]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("num_codes", [0, 1])
def test_levels_of_one_code_or_none_have_no_ngrams(num_codes: int, n: int) -> None:
    made = connected(np.zeros((3, num_codes)), (1, 1, num_codes))
    assert made.sql(f"from code_ngrams('made', {n})").fetchall() == []


@pytest.mark.parametrize("product", ["fake", "dct", "levels", "native"])
def test_the_static_share_is_that_of_numpy_over_all_levels(cache: TokenCache, product: str) -> None:
    ids, levels = levels_of(cache, product)
    same = [(level[:, 1:] == level[:, :-1]).reshape(len(level), -1) for level in levels]
    wanted = dict(zip(ids, np.concatenate(same, axis=1).mean(1), strict=True))
    rows = cache.sql(f"from static_clips('{product}')").to_pylist()
    assert {row["clip_id"]: row["share"] for row in rows} == pytest.approx(wanted)
    assert rows == sorted(rows, key=lambda row: (-row["share"], row["clip_id"]))


def test_a_clip_in_which_nothing_moves_has_a_share_of_one() -> None:
    still, half, moving = np.ones((2, 1, 2)), np.array([[[1, 1]], [[1, 2]]]), np.arange(4).reshape(2, 1, 2)
    made = connected(np.stack([moving, half, still]), (2, 1, 2))
    moving_id, half_id, still_id = clip_ids(3)
    assert made.sql("from static_clips('made')").fetchall() == [(still_id, 8, 1), (half_id, 8, 0.5), (moving_id, 8, 0)]


def test_grids_of_one_time_step_have_no_static_share() -> None:
    made = connected(np.ones((2, 4)), (1, 2, 2))
    assert made.sql("select clip_id, share from static_clips('made')").fetchall() == [(i, None) for i in clip_ids(2)]


@pytest.mark.parametrize("macro", ["code_ngrams('{}', 2)", "static_clips('{}')", "duplicate_clips('{}')"])
@pytest.mark.parametrize(("product", "message"), [("other", "_other does not exist"), ("mean", "_mean|codes")])
def test_products_without_codes_are_refused(cache: TokenCache, macro: str, product: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        cache.sql(f"from {macro.format(product)}")
