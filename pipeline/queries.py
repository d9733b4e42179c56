"""The queries that a cache knows, each once."""

from collections.abc import Sequence

import pyarrow as pa

from ..schemas.queries import query_id_of
from ..schemas.tables import QUERY_SCHEMA
from .appended import Keys
from .storage import Folder

QUERIES = "relevance/queries"


def add_queries(folder: Folder, texts: Sequence[str]) -> list[str]:
    """The ids of `texts`, in their order; those that the cache in `folder` lacks are added.

    RecipeError for an empty one, before any is added.
    """
    return add_lacking_queries(known_queries(folder), texts)


def known_queries(folder: Folder) -> Keys:
    """The ids of the queries of a cache."""
    return Keys(folder, QUERIES, QUERY_SCHEMA, ["query_id"])


def add_lacking_queries(known: Keys, texts: Sequence[str]) -> list[str]:
    """As `add_queries`, for who adds often: `known` reads no file of queries twice."""
    rows = [{"query_id": query_id_of(text), "text": text.strip()} for text in texts]
    different = {row["query_id"]: row for row in rows}

    def lacking() -> pa.Table:
        new = [row for query_id, row in different.items() if (query_id,) not in known]
        return pa.Table.from_pylist(new, schema=QUERY_SCHEMA)

    known.append(lacking)
    return [row["query_id"] for row in rows]
