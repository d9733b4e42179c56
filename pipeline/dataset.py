"""Random access to a cache, for samplers of one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .cache import TokenCache
from .clip_list import list_clips
from .clip_reader import ClipReader
from .loader import check_columns
from .local_cache import LocalCache
from .stored_product import stored_product


class TokenDataset(Dataset[dict[str, Any]]):
    """The clips of a cache by number, in the order of its files: ``dataset[i]`` is a dict of one clip.

    It has ``clip_id``, ``num_valid``, every product under the name by which it was asked for, in the types of
    TokenLoader without the first dimension (trajectories as (N,d)), and `columns`. Any thread and process may read it;
    a clip takes microseconds. Batches come sooner from a TokenLoader.
    """

    def __init__(
        self,
        cache: TokenCache,
        products: str | Sequence[str],
        *,
        where: str = "true",
        columns: Sequence[str] | Mapping[str, str] = (),
        levels: int | None = None,
        verify: bool = True,
        local: LocalCache | None = None,
    ) -> None:
        names = [products] if isinstance(products, str) else list(products)
        expressions = check_columns(columns, names)
        stored = {name: stored_product(cache, name) for name in names}
        clips = list_clips(cache, list(stored.values()), where, expressions)
        self._columns, self._num_clips = list(expressions), clips.num_clips
        self._reader = ClipReader(cache.folder, clips, stored, local or LocalCache(), levels=levels, verify=verify)

    def __len__(self) -> int:
        return self._num_clips

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, clips = index + self._num_clips if index < 0 else index, self._reader.clips
        if not 0 <= number < self._num_clips:
            raise IndexError(f"there are {self._num_clips} clips, asked for number {index}")
        sample = clips.head(number)
        for name, read in self._reader.readers_of_one:
            sample[name] = read(number)
        for name in self._columns:
            sample[name] = clips.column(name, np.array([number]))[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]
