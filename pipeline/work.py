"""The work: what plans ask for and no manifest names yet."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..schemas.shard import ShardPlan, ShardTask
from .manifests import committed_names, missing_products
from .plan_file import Plan
from .storage import Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingWork:
    """A shard that is not complete: where its plan is, and the products that no manifest names.

    `retries` are, by product, the later plans that try clips again: what they hold is not this shard's any more. It
    matters where a manifest was deleted, to make a damaged file again, after its failures had been retried.
    """

    plan: Plan
    index: int
    num_clips: int
    products: tuple[str, ...]
    retries: Mapping[str, tuple[Plan, ...]]

    def tasks(self) -> Iterator[ShardTask]:
        """The shard as tasks: one, unless clips were retried for some products and not for others."""
        shard = self.plan.shard(self.index)
        products: defaultdict[frozenset[str], list[str]] = defaultdict(list)
        for product in self.products:
            shards = (clip_ids for plan in self.retries[product] for clip_ids in plan.clip_ids)
            products[frozenset(clip_id for clip_ids in shards for clip_id in clip_ids)].append(product)
        for retried, names in products.items():
            clips = tuple(clip for clip in shard.clips if clip.clip_id not in retried)
            if clips:
                yield ShardTask(plan=ShardPlan(shard_id=shard.shard_id, clips=clips), products=tuple(names))


def missing_work(folder: Folder, plans: Sequence[Plan], fingerprints: Mapping[str, str]) -> list[MissingWork]:
    """Plan minus manifests."""
    committed = committed_names(folder)
    todo = []
    for number, plan in enumerate(plans, start=1):
        covered = {product: version for product, version in fingerprints.items() if plan.covers(product, version)}
        later = [plan for plan in plans[number:] if plan.is_retry]
        for index, (shard_id, num_clips) in enumerate(plan.shards()):
            products = missing_products(committed, shard_id, covered)
            if products:
                retries = {p: tuple(plan for plan in later if plan.covers(p, fingerprints[p])) for p in products}
                todo.append(
                    MissingWork(plan=plan, index=index, num_clips=num_clips, products=products, retries=retries)
                )
    return todo
