"""Views are there when a query names them, and none is made that no query needs."""

from pathlib import Path

import pytest

from tokenmill.pipeline.cache import TokenCache, open_cache
from tokenmill.schemas.errors import CacheError

from .test_cache import make_cache


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("caches") / "cache")
    make_cache(path)
    return path


@pytest.fixture
def cache(url: str) -> TokenCache:
    return open_cache(url)


def made(cache: TokenCache) -> set[str]:
    """The parts of the views that are there."""
    views = cache._session._views
    return set(views.made) if views else set()


TOKENS = {f"tokens/{name}" for name in ("fake", "dct", "mean", "levels", "native")}
ALL = {*TOKENS, "tokens/", "macros"}


@pytest.mark.parametrize(
    ("query", "parameters", "parts"),
    [
        ("select count(*) from clips join locations l on l.clip_id = clips.clip_id::uuid", [], set()),
        ("select codes from Tokens_DCT order by clip_id", [], {"tokens/dct"}),
        ("select count(*) from levels_native", [], {"tokens/native"}),
        ("from code_usage('fake')", [], {"macros", "tokens/fake"}),
        ("from code_statistics(?)", ["levels"], {"macros", "tokens/levels"}),
        ("select count(*) from query_table(?)", ["tokens_mean"], ALL),
        ("from query_table('tokens_' || concat('d', 'ct'))", [], ALL),
        ("select count(*) from tokens", [], {*TOKENS, "tokens/"}),
    ],
)
def test_what_a_query_names_is_made(cache: TokenCache, query: str, parameters: list[str], parts: set[str]) -> None:
    answer = cache.sql(query, parameters)
    assert made(cache) == parts
    cache.sql("select view_name from duckdb_views()")
    assert cache.sql(query, parameters) == answer


def test_all_views_are_listed(cache: TokenCache) -> None:
    listed = cache.sql("select view_name from duckdb_views() where temporary and not internal")["view_name"].to_pylist()
    assert {"tokens", "tokens_dct", "tokens_mean", "levels_dct"} <= set(listed)
    assert "levels_mean" not in listed


def test_what_is_like_an_unknown_name_is_named(cache: TokenCache) -> None:
    with pytest.raises(CacheError, match=r'Table with name token_dct does not exist! Did you mean "tokens_dct'):
        cache.sql("from token_dct")
    with pytest.raises(CacheError, match="levels_nothing does not exist"):
        cache.sql("from code_usage('nothing')")


def test_a_damaged_file_stops_only_the_queries_that_need_it(tmp_path: Path) -> None:
    make_cache(str(tmp_path))
    cache = open_cache(str(tmp_path))
    cache.sql("select 1")
    damaged = sorted((tmp_path / "tokens" / "dct").iterdir())[0]
    data = damaged.read_bytes()
    damaged.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CacheError, match=r"a data file cannot be read .*tokenmill verify names what is damaged"):
            cache.sql("select count(*) from tokens_dct")
    assert cache.sql("select count(*) as n from tokens_fake")["n"][0].as_py()
    damaged.write_bytes(data)
    assert cache.sql("select count(*) as n from tokens_dct where len(codes) = 12")["n"][0].as_py()


def test_very_many_files_are_a_variable_and_no_part_of_a_view(cache: TokenCache) -> None:
    cache.sql("select count(*) from tokens_dct")
    (text,) = cache.sql("select sql from duckdb_views() where view_name = 'tokens_dct'")["sql"].to_pylist()
    assert ".parquet" not in text
    num_files = cache.sql("select count(*) as n from files where product = 'tokens/dct'")["n"][0].as_py()
    assert cache.sql("select len(getvariable('files_of_tokens_dct')) as n")["n"].to_pylist() == [num_files]
