"""A query is named by what it says, and files of queries say what is wrong with them."""

import pytest

from tokenmill.schemas.errors import RecipeError
from tokenmill.schemas.queries import query_id_of, read_queries


def test_an_id_is_decided_by_kind_and_content() -> None:
    ids = [query_id_of("a red car"), query_id_of("a blue car"), query_id_of(example="a red car")]
    assert ids == ["509fe8ea1cde96f1", "8ade59af81ea824d", "f49b3f7cac8ad693"]
    assert query_id_of("  a red car\n") == ids[0]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_query_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="an empty text is no query"):
        query_id_of(text)
    with pytest.raises(RecipeError, match="an empty example is no query"):
        query_id_of(example=text)


def test_a_query_is_a_text_or_an_example() -> None:
    with pytest.raises(ValueError, match="a text or an example"):
        query_id_of()
    with pytest.raises(ValueError, match="a text or an example"):
        query_id_of("a red car", "a blue car")


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
