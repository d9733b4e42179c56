"""The ranks of a distributed training."""

import torch

from ..schemas.errors import CacheError


def place_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: those given, else of torch.distributed, else alone."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both of rank and world_size, or none: {rank=} {world_size=}")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1: {rank=} {world_size=}")
    return rank, world_size


def refuse_other_data(digest: str) -> None:
    """CacheError on all ranks of torch.distributed where some have other data: their steps would not be the same."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    digests: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        others = [rank for rank, one in enumerate(digests) if one != digests[0]]
        raise CacheError(
            f"ranks {', '.join(map(str, others))} read other clips than rank 0: open the cache at one snapshot on all"
            f" ranks (open_cache(uri, snapshot=N)), and give all the same where, without random() or now()"
        )
