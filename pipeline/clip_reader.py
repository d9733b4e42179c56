"""Reading many clips of a cache at once: the values of every product, as tensors of the type that is stored."""

import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..schemas.errors import CacheError
from .clip_list import ClipList
from .local_cache import LocalCache
from .mapped_tokens import MappedTokens, runs
from .mask_file import MaskFile
from .storage import Folder, storage_errors
from .stored_product import StoredProduct
from .token_file import LOW, TokenLayout, from_planes

MOST_MASK_FILES = 16
_CODES = np.dtype("<u2")
MASK_BYTES = 1 << 20  # of the masks of a clip, about


class Packed(NamedTuple):
    """Vectors of several clips one after the other, as variable-length attention takes them.

    `values` are (sum of N, d); those of clip i are ``values[cu_seqlens[i]:cu_seqlens[i + 1]]``. `cu_seqlens` is int32
    (B+1,), `max_seqlen` the most that a clip has.
    """

    values: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(slots=True)
class Values:
    """The values of some clips in one product; `counts_N` of each clip, where they have different numbers of them."""

    values: Any  # a tensor, or of masks a list of them
    counts_N: np.ndarray | None = None

    def part(self, begin: int, end: int) -> Any:
        """Those of clips begin..end-1 as a batch has them."""
        if self.counts_N is None:
            found = self.values[begin:end]
            return _stacked(found) if isinstance(found, list) else found
        counts_N = self.counts_N[begin:end]
        first = int(self.counts_N[:begin].sum())
        cu_seqlens = np.zeros(len(counts_N) + 1, np.int32)
        np.cumsum(counts_N, out=cu_seqlens[1:])
        values = self.values[first : first + int(cu_seqlens[-1])]
        return Packed(values, torch.from_numpy(cu_seqlens), int(counts_N.max(initial=0)))

    def pinned(self) -> "Values":
        """The same in page-locked memory, from which GPUs copy while they work."""
        if isinstance(self.values, list):
            return Values([grid.pin_memory() for grid in self.values])
        return Values(self.values.pin_memory(), self.counts_N)

    def reordered(self, order_N: np.ndarray) -> "Values":
        """The clips in another order."""
        if isinstance(self.values, list):
            return Values([self.values[i] for i in order_N.tolist()])
        if self.counts_N is None:
            return Values(self.values[torch.from_numpy(order_N)])
        begins_N = np.cumsum(self.counts_N) - self.counts_N
        chosen = runs(begins_N[order_N], self.counts_N[order_N])
        return Values(self.values[torch.from_numpy(chosen)], self.counts_N[order_N])


def _stacked(grids: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """Masks as one tensor where all have the same size."""
    return torch.stack(grids) if len({grid.shape for grid in grids}) == 1 else grids


def joined(parts: Sequence[Values]) -> Values:
    """The clips of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part.values, list) for part in parts):
        return Values([grid for part in parts for grid in part.values])
    counts = [part.counts_N for part in parts if part.counts_N is not None]
    return Values(torch.cat([part.values for part in parts]), np.concatenate(counts) if counts else None)


class ClipReader:
    """Reads clips of one cache by their numbers in a ClipList; `names` are what its products are called in batches."""

    def __init__(
        self,
        folder: Folder,
        clips: ClipList,
        products: Mapping[str, StoredProduct],
        local: LocalCache,
        *,
        levels: int | None = None,
        verify: bool = True,
    ) -> None:
        self.clips = clips
        self._products = dict(products)
        self._layouts = {name: layout_of(product, levels) for name, product in products.items()}
        self._masks = MaskFiles(folder)
        self._tokens = {
            name: MappedTokens(folder, product, _columns(product, self._layouts[name]), local, verify=verify)
            for name, product in products.items()
            if product.kind != "masks"
        }

    def product(self, name: str) -> StoredProduct:
        """The product that batches call `name`."""
        return self._products[name]

    def tokens(self, clips_N: np.ndarray | slice) -> np.ndarray:
        """How many tokens clips have in the first product, by number."""
        first, counts = next(iter(self._products.values())), self.clips.counts[0]
        if counts is None:
            return np.broadcast_to(first.tokens_per_clip, self.clips.num_valid[clips_N].shape)
        return counts[clips_N]

    @property
    def bytes_per_clip(self) -> int:
        """Of all products, about."""
        total = 0.0
        for i, product in enumerate(self._products.values()):
            counts = self.clips.counts[i]
            per_value = sum(product.widths.values()) or MASK_BYTES
            total += per_value * (1.0 if counts is None else float(counts.mean()))
        return int(total)

    def read_one(self, clip: int) -> dict[str, Any]:
        """The values of one clip in every product: a grid, masks, or vectors (N,d); CacheError where it is damaged."""
        found: dict[str, Any] = {}
        for i, (name, product) in enumerate(self._products.items()):
            first, counts = int(self.clips.firsts[i][clip]), self.clips.counts[i]
            if product.kind == "masks":
                found[name] = self._masks.read(product, np.array([first]), skip_damaged=False)[0].values[0]
            else:
                planes = self._tokens[name].read_one(first, 1 if counts is None else int(counts[clip]))
                values = _as_array(planes, self._layouts[name], product)
                found[name] = _as_tensor(values[0] if counts is None else values, self._layouts[name])
        return found

    def read(self, clips_N: np.ndarray, *, skip_damaged: bool = False) -> tuple[dict[str, Values], np.ndarray]:
        """The values of clips in every product, and which of the clips (N,) these are: damaged ones are left out.

        CacheError where tokens are damaged, without `skip_damaged`.
        """
        found: dict[str, Values] = {}
        damaged_N = np.zeros(len(clips_N), bool)
        for i, (name, product) in enumerate(self._products.items()):
            counts = self.clips.counts[i]
            firsts_N, counts_N = self.clips.firsts[i][clips_N], None if counts is None else counts[clips_N]
            if product.kind == "masks":
                found[name], damaged = self._masks.read(product, firsts_N, skip_damaged=skip_damaged)
            else:
                planes, damaged = self._tokens[name].read(firsts_N, counts_N, skip_damaged=skip_damaged)
                layout = self._layouts[name]
                found[name] = Values(_as_tensor(_as_array(planes, layout, product), layout), counts_N)
            damaged_N |= damaged
        if damaged_N.any():  # seldom: once more, without them
            kept_N = np.flatnonzero(~damaged_N)
            values, _ = self.read(clips_N[kept_N], skip_damaged=skip_damaged)
            return values, kept_N
        return found, np.arange(len(clips_N))


def layout_of(product: StoredProduct, levels: int | None) -> TokenLayout:
    """The layout of a product, or of its first levels where it has any; CacheError where there are not so many."""
    if levels is None or not product.layout.levels:
        return product.layout
    if not 1 <= levels <= len(product.layout.levels):
        raise CacheError(f"{product.name}: {levels} levels were asked for: it has 1 to {len(product.layout.levels)}")
    return product.layout.first_levels(levels)


def _columns(product: StoredProduct, layout: TokenLayout) -> list[str]:
    return list(layout.widths) if product.kind == "grid" else list(product.widths)


def _as_array(planes: Mapping[str, np.ndarray], layout: TokenLayout, product: StoredProduct) -> np.ndarray:
    """Values as they are stored, without a copy where one column holds them: codes uint16, or int32 of two columns."""
    if product.kind == "packed":
        planes = {LOW: next(iter(planes.values()))}
    if layout.codebook_size is None or layout.high_bits:
        return from_planes(planes, layout)
    if not layout.levels:
        return planes[LOW].view(_CODES).reshape(len(planes[LOW]), *layout.shape)
    together = np.concatenate([plane.view(_CODES) for plane in planes.values()], axis=1)
    if len(layout.shape) == 1:
        return together
    return np.moveaxis(together.reshape(len(together), len(layout.levels), *layout.levels[0]), 1, -1)


def _as_tensor(values: np.ndarray, layout: TokenLayout) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if layout.dtype == "bfloat16" else tensor


class MaskFiles:
    """Files of masks that were read last, open; it travels without them."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._pid = folder, os.getpid()
        self._files: OrderedDict[str, MaskFile] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _mask_files, (self._folder.url,)

    def read(self, product: StoredProduct, rows_N: np.ndarray, *, skip_damaged: bool) -> tuple[Values, np.ndarray]:
        """Masks uint8 (T,H,W) of rows of the product, and which of them (N,) are damaged."""
        starts = product.file_starts["first_row"].to_numpy()
        files_N = np.searchsorted(starts, rows_N, side="right") - 1
        masks, damaged_N = [], np.zeros(len(rows_N), bool)
        for i, (file, row) in enumerate(zip(files_N.tolist(), rows_N.tolist(), strict=True)):
            try:
                found = self._opened(product.groups.names_F[file]).read(row - int(starts[file]))
                masks.append(torch.from_numpy(np.array(found.masks_THW)))
            except CacheError:
                if not skip_damaged:
                    raise
                damaged_N[i] = True
        return Values(masks), damaged_N

    def _opened(self, name: str) -> MaskFile:
        if self._pid != os.getpid():  # streams of stores do not survive a fork
            self.__init__(Folder(self._folder.url))
        if name not in self._files:
            with storage_errors(self._folder.uri(name)):
                if self._folder.is_local:
                    with open(self._folder.path(name), "rb") as stream:
                        buffer: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                else:  # row group by row group
                    buffer = self._folder.fs.open(self._folder.path(name), "rb", cache_type="none")
                self._files[name] = MaskFile(buffer, self._folder.uri(name))
            if len(self._files) > MOST_MASK_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(name)
        return self._files[name]


def _mask_files(url: str) -> MaskFiles:
    return MaskFiles(Folder(url))
