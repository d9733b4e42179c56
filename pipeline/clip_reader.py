"""Reading many clips of a cache at once: the values of every product, as tensors of the type that is stored."""

import bisect
import itertools
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..schemas.errors import CacheError
from .clip_list import ClipList
from .local_cache import LocalCache
from .mapped_tokens import MappedTokens
from .mapped_values import runs
from .mask_file import MaskFile
from .storage import Folder, storage_errors
from .stored_product import StoredProduct
from .token_file import LOW, TokenLayout, from_planes

MOST_MASK_FILES = 16
GATHERED_BYTES = 512 << 10  # at once, of small batches: what a gather costs besides copying is shared by them
_CODES = np.dtype("<u2")
_STORED = {"uint16": _CODES, "float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2")}
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
    """The values of some clips in one product, of which `read` gives those from one number to another.

    `ends_N` says where the values of each clip end, where clips have different numbers of them. About so many as
    `at_once` are best read together.
    """

    read: Callable[[int, int], Any]
    num_values: int
    at_once: int
    ends_N: np.ndarray | None = None

    def parts(self, bounds: Sequence[int], *, pin: bool) -> Iterator[Any]:
        """What each batch has, of clips ``bounds[i]`` to ``bounds[i + 1] - 1``; read as it is asked for."""
        if self.ends_N is None:
            return self._tensors(bounds, pin=pin)
        ends_N, firsts_B = np.append(0, self.ends_N), np.asarray(bounds[:-1])
        sizes_B = np.diff(bounds) + 1
        cu_seqlens = ends_N[runs(firsts_B, sizes_B)] - np.repeat(ends_N[firsts_B], sizes_B)
        longest = [int(np.diff(ends_N[a : b + 1]).max(initial=0)) for a, b in itertools.pairwise(bounds)]
        values = self._tensors(ends_N[list(bounds)].tolist(), pin=pin)
        parts = torch.from_numpy(cu_seqlens.astype(np.int32)).split(sizes_B.tolist())
        return map(Packed, values, parts, longest)

    def _tensors(self, bounds: Sequence[int], *, pin: bool) -> Iterator[Any]:
        """The values between each two of `bounds`."""
        if self.at_once // 2 > max(np.diff(bounds), default=0):
            return itertools.chain.from_iterable(self._read_together(bounds, pin=pin))
        values = map(self.read, bounds[:-1], bounds[1:])
        return map(_pinned, values) if pin else values

    def _read_together(self, bounds: Sequence[int], *, pin: bool) -> Iterator[Sequence[torch.Tensor]]:
        """As _tensors: those of several batches are views of what was read at once."""
        i = 0
        while i < len(bounds) - 1:
            j = bisect.bisect_right(bounds, bounds[i] + self.at_once) - 1
            values = self.read(bounds[i], bounds[j])
            sizes = [end - begin for begin, end in itertools.pairwise(bounds[i : j + 1])]
            yield (_pinned(values) if pin else values).split(sizes)
            i = j

    def chosen(self, clips_N: np.ndarray) -> "Values":
        """Some clips, in the order given."""
        values = self.read(0, self.num_values)
        if isinstance(values, list):
            return listed([values[i] for i in clips_N.tolist()])
        if self.ends_N is None:
            return held(values[torch.from_numpy(clips_N)])
        counts_N = np.diff(self.ends_N, prepend=0)
        chosen = runs((self.ends_N - counts_N)[clips_N], counts_N[clips_N])
        return held(values[torch.from_numpy(chosen)], counts_N[clips_N])


def _pinned(values: Any) -> Any:
    """The same in page-locked memory, from which GPUs copy while they work."""
    return [grid.pin_memory() for grid in values] if isinstance(values, list) else values.pin_memory()


def held(values: torch.Tensor, counts_N: np.ndarray | None = None) -> Values:
    """Values that are a tensor."""
    ends_N = None if counts_N is None else np.cumsum(counts_N)
    return Values(lambda begin, end: values[begin:end], len(values), len(values), ends_N)


def listed(grids: list[torch.Tensor]) -> Values:
    """Masks, given as one tensor where they have the same size."""

    def read(begin: int, end: int) -> torch.Tensor | list[torch.Tensor]:
        part = grids[begin:end]
        return torch.stack(part) if len({grid.shape for grid in part}) == 1 else part

    return Values(read, len(grids), at_once=0)


def joined(parts: Sequence[Values]) -> Values:
    """The clips of several parts, one after the other."""
    values = [part.read(0, part.num_values) for part in parts]
    if any(isinstance(one, list) for one in values):
        return listed([grid for one in values for grid in one])
    counts = [np.diff(part.ends_N, prepend=0) for part in parts if part.ends_N is not None]
    return held(torch.cat(values), np.concatenate(counts) if counts else None)


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
        # Of products whose clips have one value in one column, which is most of them.
        self._quick = {
            name: (_STORED[layout.dtype], layout.shape)
            for name, layout in self._layouts.items()
            if products[name].kind == "grid" and not layout.high_bits and len(layout.widths) == 1
        }
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

    @cached_property
    def readers_of_one(self) -> list[tuple[str, Callable[[int], torch.Tensor]]]:
        """For every product a function from a clip to a grid, masks, or vectors (N,d); CacheError where damaged."""
        return [(name, self._reader_of_one(i, name)) for i, name in enumerate(self._products)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "readers_of_one"}

    def _reader_of_one(self, i: int, name: str) -> Callable[[int], torch.Tensor]:
        """Reads one clip in a product."""
        product, layout, counts = self._products[name], self._layouts[name], self.clips.counts[i]
        firsts = self.clips.firsts[i].data  # gives single numbers in a quarter of numpy's time
        if product.kind == "masks":
            return lambda clip: self._masks.read(product, np.array([firsts[clip]]), skip_damaged=False)[0][0]
        tokens = self._tokens[name]

        def read(clip: int) -> torch.Tensor:
            planes = tokens.read_one(firsts[clip], 1 if counts is None else int(counts[clip]))
            values = _as_array(planes, layout, product)
            return _as_tensor(values[0] if counts is None else values, layout)

        if name not in self._quick or not tokens.is_steady:
            return read
        value_at, to_tensor = tokens.reader_of_one(*self._quick[name]), _to_tensor(layout)

        def read_quickly(clip: int) -> torch.Tensor:
            value = value_at(firsts[clip])
            return read(clip) if value is None else to_tensor(value)

        return read_quickly

    def read(self, clips_N: np.ndarray, *, skip_damaged: bool = False) -> tuple[dict[str, Values], np.ndarray]:
        """The values of clips in every product, and which of the clips (N,) these are: damaged ones are left out.

        CacheError where tokens are damaged, without `skip_damaged`.
        """
        found: dict[str, Values] = {}
        damaged_N = np.zeros(len(clips_N), bool)
        for i, (name, product) in enumerate(self._products.items()):
            counts = self.clips.counts[i]
            firsts_N = self.clips.firsts[i].take(clips_N)
            counts_N = None if counts is None else counts.take(clips_N)
            if product.kind == "masks":
                grids, damaged = self._masks.read(product, firsts_N, skip_damaged=skip_damaged)
                found[name] = listed(grids)
            elif self._tokens[name].is_steady:
                found[name], damaged = self._mapped(name, firsts_N, counts_N, skip_damaged=skip_damaged)
            else:
                planes, damaged = self._tokens[name].read(firsts_N, counts_N, skip_damaged=skip_damaged)
                found[name] = held(self._tensor(name, planes), None if counts_N is None else counts_N[~damaged])
            damaged_N |= damaged
        if damaged_N.any():  # seldom: once more, without them
            kept_N = np.flatnonzero(~damaged_N)
            values, _ = self.read(clips_N[kept_N], skip_damaged=skip_damaged)
            return values, kept_N
        return found, np.arange(len(clips_N))

    def _mapped(
        self, name: str, firsts_N: np.ndarray, counts_N: np.ndarray | None, *, skip_damaged: bool
    ) -> tuple[Values, np.ndarray]:
        """Values that are gathered when a batch is made."""
        columns, damaged_N = self._tokens[name].mapped(firsts_N, counts_N, skip_damaged=skip_damaged)
        ends_N = None if counts_N is None else np.cumsum(counts_N)
        num_values = len(firsts_N) if ends_N is None else int(ends_N[-1]) if len(ends_N) else 0
        layout, product = self._layouts[name], self._products[name]
        if quick := self._quick.get(name):
            value_type = np.dtype(quick)
            (gather,) = [column.gather for column in columns.values()]

            def read(begin: int, end: int) -> torch.Tensor:
                return _as_tensor(gather(begin, end).view(value_type), layout)
        else:

            def read(begin: int, end: int) -> torch.Tensor:
                planes = {
                    name: column.gather(begin, end).view(np.dtype((np.uint8, column.width)))
                    for name, column in columns.items()
                }
                return _as_tensor(_as_array(planes, layout, product), layout)

        return Values(read, num_values, GATHERED_BYTES // max(1, sum(product.widths.values())), ends_N), damaged_N

    def _tensor(self, name: str, planes: Mapping[str, np.ndarray]) -> torch.Tensor:
        layout = self._layouts[name]
        return _as_tensor(_as_array(planes, layout, self._products[name]), layout)

    @property
    def is_at_hand(self) -> bool:
        """Whether all values are mapped and checked, and those of last time were in memory."""
        return self.is_gathered_late and all(one.is_at_hand for one in self._tokens.values())

    @property
    def is_gathered_late(self) -> bool:
        """Whether values cost no memory before a batch is made of them."""
        return len(self._tokens) == len(self._products) and all(one.is_steady for one in self._tokens.values())


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
    return _to_tensor(layout)(values)


def _to_tensor(layout: TokenLayout) -> Callable[[np.ndarray], torch.Tensor]:
    if layout.dtype == "bfloat16":
        return lambda values: torch.from_numpy(values).view(torch.bfloat16)
    return torch.from_numpy


class MaskFiles:
    """Files of masks that were read last, open; it travels without them."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._pid, self._lock = folder, os.getpid(), threading.Lock()
        self._files: OrderedDict[str, MaskFile] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _mask_files, (self._folder.url,)

    def read(
        self, product: StoredProduct, rows_N: np.ndarray, *, skip_damaged: bool
    ) -> tuple[list[torch.Tensor], np.ndarray]:
        """Masks uint8 (T,H,W) of rows of the product, and which of them (N,) are damaged."""
        starts = product.file_starts["first_row"].to_numpy()
        files_N = np.searchsorted(starts, rows_N, side="right") - 1
        masks, damaged_N = [], np.zeros(len(rows_N), bool)
        for i, (file, row) in enumerate(zip(files_N.tolist(), rows_N.tolist(), strict=True)):
            try:
                if self._pid != os.getpid():  # neither locks nor streams of stores survive a fork
                    self.__init__(Folder(self._folder.url))
                with self._lock:
                    found = self._opened(product.groups.names_F[file]).read(row - int(starts[file]))
                masks.append(torch.from_numpy(np.array(found.masks_THW)))
            except CacheError:
                if not skip_damaged:
                    raise
                damaged_N[i] = True
        return masks, damaged_N

    def _opened(self, name: str) -> MaskFile:
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
