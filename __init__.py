"""tokenmill: video in, cached tokens out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jobs.opening import open_cache
    from .pipeline.cache import TokenCache
    from .pipeline.dataset import TokenDataset
    from .pipeline.loader import TokenLoader
    from .tokenizers.load import load_tokenizer

__version__ = "0.1.0"
__all__ = ["TokenCache", "TokenDataset", "TokenLoader", "__version__", "load_tokenizer", "open_cache"]

_ADDRESSES = {
    "TokenCache": ".pipeline.cache",
    "open_cache": ".jobs.opening",
    "TokenDataset": ".pipeline.dataset",
    "TokenLoader": ".pipeline.loader",
    "load_tokenizer": ".tokenizers.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import tokenmill` alone loads neither torch nor Ray."""
    if name not in _ADDRESSES:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_ADDRESSES[name], __name__), name)
