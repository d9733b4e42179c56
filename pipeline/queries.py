"""The queries that a cache knows, each once."""

from collections.abc import Sequence

import pyarrow as pa

from ..schemas.queries import query_id_of
from ..schemas.tables import QUERY_SCHEMA
from .appended import Keys, append
from .storage import Folder

QUERIES = "relevance/queries"


def add_queries(folder: Folder, texts: Sequence[str] = (), examples: Sequence[str] = ()) -> list[str]:
    """The ids of `texts`, then of `examples`, in their order; those that the cache in `folder` lacks are added.

    RecipeError for an empty one, before any is added.
    """
    return add_lacking_queries(known_queries(folder), texts, examples)


def known_queries(folder: Folder) -> Keys:
    """The ids of the queries of a cache."""
    return Keys(folder, QUERIES, QUERY_SCHEMA, ["query_id"])


def add_lacking_queries(known: Keys, texts: Sequence[str] = (), examples: Sequence[str] = ()) -> list[str]:
    """As `add_queries`, for who adds often: `known` reads no file of queries twice."""
    rows = [{"query_id": query_id_of(text), "text": text.strip(), "example": None} for text in texts]
    rows += [{"query_id": query_id_of(None, one), "text": None, "example": one.strip()} for one in examples]
    different = {row["query_id"]: row for row in rows}

    def lacking() -> pa.Table:
        there = known.read()
        new = [row for query_id, row in different.items() if (query_id,) not in there]
        return pa.Table.from_pylist(new, schema=QUERY_SCHEMA)

    append(known.folder, QUERIES, lacking)
    return [row["query_id"] for row in rows]
