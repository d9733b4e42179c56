"""Feeding a training loop from a cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .cache import TokenCache
from .views import CLIPS_WITH_VIDEOS


class TokenLoader(IterableDataset[dict[str, Any]]):
    """Batches of one product, in the order of the cache's files.

    Each is a dict: ``clip_id`` (list of str), ``tokens`` (codes int32 (B,t,h,w) or latents (B,t,h,w,d)) and
    ``num_valid`` (B,) int64, the real frames of each clip. The last batch may be smaller. It can be iterated as it
    is, or given to ``DataLoader(loader, batch_size=None)``, whose workers then take every n-th batch. Codes that come
    in levels are as TokenCache.read gives them, with `levels` those of the first few alone.
    """

    def __init__(
        self, cache: TokenCache, product: str, batch_size: int, *, where: str = "true", levels: int | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, found {batch_size}")
        self._cache = cache
        self._product = cache.grid_product(product)
        self._batch_size = batch_size
        self._levels = levels
        if levels is not None:
            cache.level_grids(self._product, levels)  # refuses what is not there
        places = cache.sql(
            f"""select l.name, l.row_in_file, c.clip_id, c.num_valid::bigint as num_valid
                from (from {CLIPS_WITH_VIDEOS} where {where}) c join locations l on c.clip_id::uuid = l.clip_id
                where l.product = ? order by l.name, l.row_in_file""",
            [self._product],
        )
        self._places = places

    def __len__(self) -> int:
        return -(-self._places.num_rows // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, len(self), step):
            batch = self._places.slice(i * self._batch_size, self._batch_size)
            yield {
                "clip_id": batch["clip_id"].to_pylist(),
                "tokens": self._cache.read_places(
                    batch["name"].to_pylist(), batch["row_in_file"].to_numpy(), levels=self._levels
                ),
                "num_valid": torch.from_numpy(batch["num_valid"].to_numpy().copy()),
            }
