"""Opening a cache with all that its queries may need."""

from ..pipeline import cache as caches
from ..pipeline.relevance import FrameEncoder, KnownEncoder
from ..schemas.recipe import EncoderSection


def open_cache(uri: str, snapshot: int | None = None) -> caches.TokenCache:
    """The token cache at a local path or fsspec URL, as it is now or as snapshot number `snapshot` pinned it.

    CacheError where there is no cache, or no such snapshot.
    """
    return caches.open_cache(uri, snapshot, load_encoder_of)


def load_encoder_of(known: KnownEncoder) -> FrameEncoder:
    """The encoder whose embeddings a cache has, on the CPU where its GPU is not here."""
    import torch

    device = None if torch.cuda.is_available() else "cpu"
    if known.has_embeddings:
        from .encoders import load_encoder

        section = {key: value for key, value in known.section.items() if key != "fps"}
        return load_encoder(EncoderSection(**section), device)
    from ..tokenizers.pyratok_scorer import PyraTokScorer

    scorer = PyraTokScorer(known.section["weights"], device or known.section["device"])
    return scorer  # pyright: ignore[reportReturnType]  its frames are those of one clip
