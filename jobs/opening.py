"""Opening a cache with all that its queries may need."""

from ..pipeline import cache as caches
from ..pipeline.relevance import FrameEncoder
from ..schemas.cache_info import ProductInfo
from ..schemas.recipe import EncoderSection


def open_cache(uri: str, snapshot: int | None = None) -> caches.TokenCache:
    """The token cache at a local path or fsspec URL, as it is now or as snapshot number `snapshot` pinned it.

    CacheError where there is no cache, or no such snapshot.
    """
    return caches.open_cache(uri, snapshot, load_encoder_of)


def load_encoder_of(entry: ProductInfo) -> FrameEncoder:
    """The encoder that made a product of embedded frames, on the CPU where its GPU is not here."""
    import torch

    from .encoders import load_encoder

    section = EncoderSection(**(entry.section or {}))
    return load_encoder(section, None if torch.cuda.is_available() else "cpu")
