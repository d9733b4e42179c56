"""The head of a cache in its files: `cache.json`, and the numbered versions of each product.

Versions are created if they are absent and never edited, so jobs that add products side by side lose none.
"""

import contextlib
from collections.abc import Mapping

from ..schemas.cache_info import (
    CACHE_INFO,
    PRODUCTS,
    CacheInfo,
    ProductInfo,
    recipe_from_json,
    version_name,
    version_of,
)
from ..schemas.errors import CacheError
from .storage import Folder


def read_info(folder: Folder) -> CacheInfo:
    """The head of the cache in `folder`; CacheError where there is none or it is damaged."""
    if not folder.exists(CACHE_INFO):
        raise CacheError(
            f"{folder.url}: no token cache there (no {CACHE_INFO}): make one with tokenmill run, or check the path"
        )
    recipe = recipe_from_json(folder.read(CACHE_INFO), folder.uri(CACHE_INFO))
    names = {product: version_name(product, number) for product, number in _current_numbers(folder).items()}
    products = {product: _read_version(folder, name) for product, name in names.items()}
    return CacheInfo(recipe=recipe, products=products)


def register_products(folder: Folder, products: Mapping[str, ProductInfo]) -> None:
    """Make these the current versions of their products; the versions before them stay on record."""
    for product, entry in products.items():
        while True:
            number = _current_numbers(folder).get(product, 0)
            with contextlib.suppress(CacheError):  # a damaged version is followed by a whole one
                if number and _read_version(folder, version_name(product, number)) == _plain(entry):
                    break
            if folder.create(version_name(product, number + 1), entry.to_json()):
                break


def _current_numbers(folder: Folder) -> dict[str, int]:
    """The number of every product's current version."""
    numbers: dict[str, int] = {}
    for name in folder.list(PRODUCTS):
        product, number = version_of(name) or ("", 0)
        if number:
            numbers[product] = max(number, numbers.get(product, 0))
    return numbers


def _read_version(folder: Folder, name: str) -> ProductInfo:
    return ProductInfo.from_json(folder.read(name), folder.uri(name))


def _plain(entry: ProductInfo) -> ProductInfo:
    """The entry as it is once it has been stored: JSON has lists for tuples."""
    return ProductInfo.from_json(entry.to_json(), "")
