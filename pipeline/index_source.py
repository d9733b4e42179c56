"""What an index is derived from: what is committed now, or what a snapshot pinned."""

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ..schemas.cache_info import CACHE_INFO, PRODUCTS, CacheInfo
from ..schemas.digest import digest_of
from ..schemas.shard import SHORT_DIGEST, ShardManifest
from ..schemas.snapshot import Snapshot
from .cache_head import read_info
from .manifests import MANIFESTS, is_manifest, read_named
from .plan_file import Plan, plan_names, read_plans
from .snapshots import pinned_manifests
from .storage import Folder

MANIFESTS_AT_ONCE = 10_000  # that are held in memory: each names the videos of its clips

Stamp = tuple[int | float | str | None, ...]  # what tells a manifest from one made again under its name


class IndexSource:
    """Plans, products and manifests, listed when this is made and read when they are asked for.

    `digest` is of what was listed: an index with another one is stale. What is read may be later than that.
    """

    def __init__(self, folder: Folder, snapshot: Snapshot | None, revision: int) -> None:
        self.folder, self._snapshot = folder, snapshot
        if snapshot:
            self.digest = digest_of([revision, snapshot.to_json().decode()])
            return
        began_s = time.time()
        # Manifests before plans: what is found committed was planned before.
        found = [file for file in folder.find(MANIFESTS) if is_manifest(file.name)]
        # A store that does not tell when a file was modified says now, which would be another time at every listing.
        self._listed: dict[str, Stamp] = {
            file.name: (file.size_bytes, file.modified_s if file.modified_s < began_s else None) for file in found
        }
        self._plan_names: Sequence[str] = plan_names(folder)
        listed = [[*folder.list(PRODUCTS), *self._plan_names], list(self._listed.items())]
        self.digest = digest_of([revision, *listed, folder.read(CACHE_INFO).decode()])

    @cached_property
    def info(self) -> CacheInfo:
        """The products in their versions."""
        return self._snapshot.info if self._snapshot else read_info(self.folder)

    @cached_property
    def plans(self) -> list[Plan]:
        """The plans in the order of their numbers."""
        return read_plans(self.folder, self._snapshot.plans if self._snapshot else self._plan_names)

    @property
    def stamp_columns(self) -> Sequence[str]:
        """What the columns of MANIFEST_SCHEMA are called that hold a manifest's stamp."""
        return ("content",) if self._snapshot else ("size_bytes", "modified_s")

    @cached_property
    def stamps(self) -> Mapping[str, Stamp]:
        """The stamp of every manifest by name; those of former versions are among them.

        A manifest never changes, but one that was deleted may be made again under its name: its stamp is another then.
        """
        return {name: (content_of(one),) for name, one in self._pinned.items()} if self._snapshot else self._listed

    def wanted(self, planned: Collection[str]) -> list[str]:
        """The names of the manifests of `planned` shards in current versions of products."""
        versions = {product: version[:SHORT_DIGEST] for product, version in self.info.fingerprints.items()}
        return [name for name in self.stamps if _is_wanted(name, versions, planned)]

    def read(self, names: Sequence[str]) -> Iterator[list[ShardManifest]]:
        """The manifests called `names`, in their order, some at a time; without the videos of their clips."""
        for first in range(0, len(names), MANIFESTS_AT_ONCE):
            some = names[first : first + MANIFESTS_AT_ONCE]
            read = [self._pinned[name] for name in some] if self._snapshot else read_named(self.folder, some)
            yield [replace(one, clips_per_video={}) for one in read]

    @cached_property
    def _pinned(self) -> dict[str, ShardManifest]:
        assert self._snapshot
        return {one.name: one for one in pinned_manifests(self.folder, self._snapshot)}


def content_of(manifest: ShardManifest) -> str:
    """The SHA-256 of what a manifest says, but for the videos of its clips."""
    return hashlib.sha256(replace(manifest, clips_per_video={}).to_json()).hexdigest()


def _is_wanted(name: str, versions: Mapping[str, str], planned: Collection[str]) -> bool:
    product, _, file = name.removeprefix(f"{MANIFESTS}/").rpartition("/")
    shard_id, _, version = file.removesuffix(".json").rpartition("-")
    return versions.get(product) == version and shard_id in planned
