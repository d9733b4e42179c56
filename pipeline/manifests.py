"""Manifests of a cache: what has been committed."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from ..schemas.shard import SHORT_DIGEST, ShardManifest, manifest_name
from .storage import Folder

MANIFESTS = "manifests"
READ_THREADS = 16


def committed_names(folder: Folder) -> frozenset[str]:
    """The names of all manifests of a cache, of every product and version."""
    return frozenset(name for name in folder.list(MANIFESTS) if name.endswith(".json"))


def missing_products(committed: frozenset[str], shard_id: str, fingerprints: Mapping[str, str]) -> tuple[str, ...]:
    """The products of a shard that no manifest names yet in the version of `fingerprints`."""
    return tuple(
        product
        for product, version in fingerprints.items()
        if manifest_name(shard_id, product, version) not in committed
    )


def read_manifests(folder: Folder, fingerprints: Mapping[str, str]) -> list[ShardManifest]:
    """All manifests of the given product versions, by product and shard."""
    wanted = [name for name in sorted(committed_names(folder)) if _is_version(name, fingerprints)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda name: ShardManifest.from_json(folder.read(name), folder.uri(name)), wanted))


def _is_version(name: str, fingerprints: Mapping[str, str]) -> bool:
    product, _, file = name.removeprefix(f"{MANIFESTS}/").rpartition("/")
    version = file.removesuffix(".json").rpartition("-")[2]
    return product in fingerprints and fingerprints[product][:SHORT_DIGEST] == version
