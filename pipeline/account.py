"""The account of a cache: planned = committed + failed + quarantined, by distinct clips, from plans and manifests.

A clip is planned by one plan of new videos, and after a failure by one retry at a time. A retry is only about product
versions whose shard has committed the clip as failed, a manifest is never edited, and a shard has one manifest of each
product version: so of all shards that hold a clip, one at most can commit it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..schemas.clip import ClipFailure
from ..schemas.shard import ShardManifest
from .plan_file import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedClip:
    """A clip whose latest attempt failed, in which shard; `failure.attempts` counts the attempts of all shards."""

    shard_id: str
    failure: ClipFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductAccount:
    """What has become of every planned clip, for one product version.

    `failed` are failures and quarantined clips, by clip id; `retrying` those of them that a retry holds whose shard
    has not been made yet.
    """

    product: str
    fingerprint: str
    num_planned: int
    num_committed: int
    failed: Mapping[str, FailedClip]
    retrying: frozenset[str]

    @property
    def num_quarantined(self) -> int:
        """How many of `failed` killed, outlasted or outgrew their decoder."""
        return sum(clip.failure.status == "quarantined" for clip in self.failed.values())

    @property
    def num_missing(self) -> int:
        """Planned clips that nothing has become of yet; below 0 a clip would have been committed twice."""
        return self.num_planned - self.num_committed - len(self.failed)


def account_of(
    product: str, fingerprint: str, plans: Sequence[Plan], manifests: Iterable[ShardManifest]
) -> ProductAccount:
    """The account of one product version. `plans` are in the order of their numbers."""
    made = {m.shard_id: m for m in manifests if (m.product, m.fingerprint) == (product, fingerprint)}
    num_planned = num_committed = 0
    failed: dict[str, FailedClip] = {}
    retrying: set[str] = set()
    for plan in plans:
        if not plan.covers(product, fingerprint):
            continue
        num_planned += 0 if plan.is_retry else plan.num_clips
        for index, (shard_id, _) in enumerate(plan.shards()):
            manifest = made.get(shard_id)
            tried = {clip_id: failed.get(clip_id) for clip_id in plan.clip_ids[index]} if plan.is_retry else {}
            if manifest is None:
                retrying.update(tried)
                continue
            for clip_id in tried:
                failed.pop(clip_id, None)
            num_committed += manifest.num_rows
            failed |= _failed_in(manifest, tried)
    return ProductAccount(
        product=product,
        fingerprint=fingerprint,
        num_planned=num_planned,
        num_committed=num_committed,
        failed=failed,
        retrying=frozenset(retrying),
    )


def accounts_of(
    plans: Sequence[Plan], manifests: Sequence[ShardManifest], fingerprints: Mapping[str, str]
) -> list[ProductAccount]:
    """The account of every product in the version of `fingerprints`."""
    return [account_of(product, version, plans, manifests) for product, version in fingerprints.items()]


def _failed_in(manifest: ShardManifest, before: Mapping[str, FailedClip | None]) -> dict[str, FailedClip]:
    """The failures of a shard, with the attempts of the shards before it."""
    failed = {}
    for failure in manifest.failures:
        earlier = before.get(failure.clip_id)
        attempts = failure.attempts + (earlier.failure.attempts if earlier else 0)
        failed[failure.clip_id] = FailedClip(shard_id=manifest.shard_id, failure=replace(failure, attempts=attempts))
    return failed
