"""tokenmill index: rebuild the DuckDB index from plans and manifests."""

from ..pipeline.cache import open_cache
from ..pipeline.index import build_index


def rebuild_index(cache: str) -> str:
    """Derive the index of `cache` anew; returns where it lies."""
    return build_index(open_cache(cache).folder)
