"""A query is named by what it says, and files of queries say what is wrong with them."""

import pytest

from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.queries import query_id_of, read_queries


def test_an_id_is_decided_by_the_text() -> None:
    ids = [query_id_of("a red car"), query_id_of("a blue car")]
    assert ids == ["509fe8ea1cde96f1", "8ade59af81ea824d"]
    assert query_id_of("  a red car\n") == ids[0]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_query_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="an empty text is no query"):
        query_id_of(text)


def test_queries_are_read_from_objects_and_texts() -> None:
    lines = ['{"query": " who sings? ", "video": "a.mp4"}\n', "\n", '"a \\u00e9clair"', "  "]
    assert read_queries(lines, "q.jsonl") == ["who sings?", "a éclair"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("who sings?", "q.jsonl, line 3: not JSON, found 'who sings\\?'; accepted: "),
        (
            '{"text": "who sings?"}',
            'line 3: no query, found {"text": "who sings\\?"}; accepted: {"query": "some text"}',
        ),
        ('{"query": ["a"]}', "line 3: no query"),
        ('{"query": "  "}', "line 3: no query"),
        ('""', "line 3: no query"),
        ("7", "line 3: no query, found 7"),
    ],
)
def test_a_line_that_is_no_query_is_named(line: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_queries(['"one"', "", line], "q.jsonl")


@pytest.mark.parametrize("lines", [[], ["", "  \n"]])
def test_a_file_without_any_query_is_refused(lines: list[str]) -> None:
    with pytest.raises(
        RecipeError, match=r'^q\.jsonl: no query in it; accepted: {"query": "some text"} or "some text"$'
    ):
        read_queries(lines, "q.jsonl")
