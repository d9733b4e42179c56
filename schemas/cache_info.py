"""The head of a cache: which recipe made it, and the current version of each product."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import CacheError
from .tables import FORMAT_VERSION, check_format

CACHE_INFO = "cache.json"
PRODUCTS = "products"
_VERSION = re.compile(rf"{PRODUCTS}/(.+)/(\d+)\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductInfo:
    """One product: the fingerprint of its current version, the recipe's section that asked for it, and what its
    tokenizer, segmenter or encoder of frames is. `shape` is that of a clip's tokens (of trajectories: of one token), or
    of an embedding; `levels` are the grids of codes that come in levels.
    """

    fingerprint: str
    section: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    segmenter: Mapping[str, Any] | None = None
    encoder: Mapping[str, Any] | None = None
    shape: tuple[int, ...] = ()
    levels: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> bytes:
        """The version as it is stored, create-if-absent, under its `version_name`."""
        return _stored(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "ProductInfo":
        """The version stored in `data`; CacheError where it is damaged or of another format."""
        values = _loaded(data, name)
        try:
            return cls.from_values(values)
        except (KeyError, TypeError) as error:
            raise CacheError(f"{name}: damaged ({error}): {HEAD_REMEDY}") from error

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "ProductInfo":
        """The version that plain values are of; KeyError or TypeError where they are not of one."""
        levels = tuple(tuple(grid) for grid in values.get("levels", ()))
        return cls(**{**values, "shape": tuple(values["shape"]), "levels": levels})


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What a cache is: the recipe of the last job, as plain values, and the current version of each product."""

    recipe: Mapping[str, Any]
    products: Mapping[str, ProductInfo]

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every product's current version."""
        return {product: entry.fingerprint for product, entry in self.products.items()}

    def values(self) -> dict[str, Any]:
        """The same as plain values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "CacheInfo":
        """The head that `values` are of; KeyError or TypeError where they are not of one."""
        products = {product: ProductInfo.from_values(entry) for product, entry in values["products"].items()}
        return cls(recipe=values["recipe"], products=products)


def version_name(product: str, number: int) -> str:
    """``products/<product>/<number>.json``: versions of a product are numbered from 1, the last is the current one."""
    return f"{PRODUCTS}/{product}/{number}.json"


def version_of(name: str) -> tuple[str, int] | None:
    """Product and number in the name of a version; None for any other file."""
    found = _VERSION.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def recipe_to_json(recipe: Mapping[str, Any]) -> bytes:
    """What `cache.json` holds of a cache made by `recipe`."""
    return _stored({"recipe": recipe})


def recipe_from_json(data: bytes, name: str) -> Mapping[str, Any]:
    """The recipe stored in `data`; CacheError where it is damaged or of another format."""
    values = _loaded(data, name)
    if not isinstance(values.get("recipe"), dict):
        raise CacheError(f"{name}: damaged (no recipe): {HEAD_REMEDY}")
    return values["recipe"]


HEAD_REMEDY = "run the recipe that made it to write it anew"


def _stored(values: Mapping[str, Any]) -> bytes:
    return json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1, sort_keys=True).encode() + b"\n"


def _loaded(data: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
        found = values.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{name}: damaged ({error}): {HEAD_REMEDY}") from error
    check_format(found, name)
    return values
