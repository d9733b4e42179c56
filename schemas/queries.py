"""What a query is called, and files of queries."""

import json
from collections.abc import Iterable

from .digest import digest_of
from .errors import RecipeError

ID_DIGITS = 16
ACCEPTED = 'accepted: {"query": "some text"} or "some text"'


def query_id_of(text: str) -> str:
    """The id of a query: 16 hex digits that its text decides.

    Space around it does not count. RecipeError for an empty one.
    """
    if not text.strip():
        raise RecipeError("an empty text is no query: give one that says what is looked for")
    return digest_of(["text", text.strip()])[:ID_DIGITS]


def read_queries(lines: Iterable[str], name: str) -> list[str]:
    """The texts of queries in JSON lines of the file called `name`: ``{"query": text}`` or a text alone.

    Empty lines are skipped; other keys are left for others to read. RecipeError names the first line that is neither,
    and a file without any query.
    """
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            raise RecipeError(f"{name}, line {number}: not JSON, found {line.strip()[:60]!r}; {ACCEPTED}") from None
        text = found.get("query") if isinstance(found, dict) else found
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(f"{name}, line {number}: no query, found {line.strip()[:60]}; {ACCEPTED}")
        texts.append(text.strip())
    if not texts:
        raise RecipeError(f"{name}: no query in it; {ACCEPTED}")
    return texts
