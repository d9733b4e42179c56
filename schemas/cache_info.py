"""The head of a cache: which recipe made it, and the current version of each product."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import CacheError
from .tables import FORMAT_VERSION

CACHE_INFO = "cache.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductInfo:
    """One product: the fingerprint of its current version; for tokens also the recipe's section that asked for
    them, what their tokenizer is, and the shape of a clip's tokens.
    """

    fingerprint: str
    section: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What `cache.json` holds. `recipe` is the recipe of the last job, as plain values."""

    recipe: Mapping[str, Any]
    products: Mapping[str, ProductInfo]
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> bytes:
        """The head as it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "CacheInfo":
        """The head stored in `data`; CacheError where it is damaged or of another format."""
        try:
            values = json.loads(data)
            found = values["format_version"]
            if found != FORMAT_VERSION:
                raise CacheError(f"{name}: format version {found}, this tokenmill reads {FORMAT_VERSION}")
            products = {
                product: ProductInfo(**{**info, "shape": tuple(info["shape"])})
                for product, info in values["products"].items()
            }
            return cls(recipe=values["recipe"], products=products)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{name}: damaged ({error}): run the recipe that made it to write it anew") from error
