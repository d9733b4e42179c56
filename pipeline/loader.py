"""Feeding a training loop from a cache."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..schemas.digest import digest_of
from ..schemas.errors import CacheError
from .cache import TokenCache
from .clip_list import chosen_rows, column_parts, joined_columns, list_clips
from .clip_order import ClipOrder, Shuffle
from .clip_reader import ClipReader, Values, joined
from .local_cache import LocalCache
from .ranks import place_of, refuse_other_data
from .step_plan import BudgetPlan, CountPlan, Tail
from .stored_product import StoredProduct, stored_product

Batch = dict[str, Any]

BLOCK_BYTES = 8 << 20  # that are read at once
BLOCKS_AHEAD = 2
PLANNED_CLIPS = 32768  # at once, of one rank
PLANNED_BYTES = 256 << 20
SLOTS = 64  # of counts of worker processes
STATE_VERSION = 1
ACCEPTED = {
    "shuffle": ("none", "window", "global"),
    "tail": ("keep", "drop", "wrap"),
    "on_damage": ("raise", "skip"),
}


@dataclass(slots=True)
class _Block:
    """The batches of some steps, made as they are asked for, and where a plan by budget finds them again."""

    batches: Iterator[Batch]
    hint: tuple[int, int]
    num_damaged: int


class TokenLoader(IterableDataset[Batch]):
    """Batches of one or several products of a cache, in one process or any number of ranks and workers.

    Each batch is a dict: ``clip_id`` (a sequence of str), ``num_valid`` (B,) int64, the real frames of each clip, every
    product under the name by which it was asked for, and `columns`. Codes are (B,t,h,w) uint16 (int32 for codebooks of
    more than 65,536; cast on the device: ``.to(device).long()``), latents (B,t,h,w,d) and embeddings in the type in
    which they are stored, trajectories and embeddings of frames `Packed`, masks (B,T,H,W) uint8.

    A global batch is `batch_size` clips, or with `token_budget` so many packs of whole clips with at most that many
    tokens of the first product; by default one pack for each rank. It depends on the data, `seed`, epoch and step
    alone: rank r of w takes its clips (packs) r, r + w, ..., so that w divides `batch_size`. `rank` and `world_size`
    are those of torch.distributed where it is initialized, unless given. `tail` says what becomes of the last clips of
    an epoch: ``keep`` a smaller batch, ``drop`` them, or ``wrap`` around to the first ones.

    ``for batch in loader`` is an epoch, the next one the next epoch; in worker processes of a DataLoader
    (``DataLoader(loader, batch_size=None, num_workers=n)``) `set_epoch` says which, as for a DistributedSampler.
    `state_dict` are a few numbers with which `load_state_dict` goes on after the last batch that was given, on any
    number of ranks. CacheError where damaged tokens are met, unless `on_damage` is ``skip``: their clips are missing
    from batches, and counted in `num_skipped`.
    """

    def __init__(
        self,
        cache: TokenCache | Mapping[TokenCache, float],
        products: str | Sequence[str],
        batch_size: int | None = None,
        *,
        where: str = "true",
        columns: Sequence[str] | Mapping[str, str] = (),
        levels: int | None = None,
        token_budget: int | None = None,
        shuffle: Shuffle = "window",
        window: int = 8192,
        seed: int = 0,
        tail: Tail = "keep",
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool = False,
        on_damage: Literal["raise", "skip"] = "raise",
        verify: bool = True,
        local: LocalCache | None = None,
    ) -> None:
        weights = dict(cache) if isinstance(cache, Mapping) else {cache: 1.0}
        names = [products] if isinstance(products, str) else list(products)
        self.rank, self.world_size = place_of(rank, world_size)
        self._token_budget = token_budget
        self._batch_size = batch_size or (self.world_size if token_budget else 0)
        self._check(names, weights, window, shuffle=shuffle, tail=tail, on_damage=on_damage)
        expressions = check_columns(columns, names)
        local = local or LocalCache()
        self._columns, self._pin, self._skip = list(expressions), pin_memory, on_damage == "skip"
        self._readers: list[ClipReader] = []
        for one in weights:
            stored = {name: stored_product(one, name) for name in names}
            clips = list_clips(one, list(stored.values()), where, expressions)
            self._readers.append(ClipReader(one.folder, clips, stored, local, levels=levels, verify=verify))
        self._first = self._readers[0].product(names[0])
        self._refuse_other_layouts(names)
        self._order = ClipOrder(
            sizes=tuple(reader.clips.num_clips for reader in self._readers),
            weights=tuple(weights.values()),
            seed=seed,
            shuffle=shuffle,
            window=window,
            run=_clips_per_run(self._readers[0], self._first),
        )
        self._tail: Tail = tail
        self._plan = self._new_plan()
        self._identity = {
            "version": STATE_VERSION,
            "data": digest_of([reader.clips.digest for reader in self._readers]),
            "order": digest_of([names, self._order.weights, shuffle, window, tail]),
            "seed": seed,
            "batch_size": self._batch_size,
            "token_budget": token_budget,
        }
        if rank is None:
            refuse_other_data(self._identity["data"])
        # Epoch, whether workers have read, and clips skipped by each: in memory that worker processes share.
        self._shared = torch.zeros(3 + SLOTS, dtype=torch.int64).share_memory_()
        self._own_epoch: int | None = None  # of a worker that was given a state of its own
        self._start, self._step, self._hint = 0, 0, (0, 0)
        self._is_begun = self._is_own_start = False

    def _check(self, names: list[str], weights: Mapping[TokenCache, float], window: int, **choices: str) -> None:
        """ValueError where settings cannot be."""
        for name, value in choices.items():
            if value not in ACCEPTED[name]:
                raise ValueError(f"{name}={value!r}: accepted are {', '.join(ACCEPTED[name])}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"products: one or more different names are accepted, found {names}")
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"weights of caches must be above 0, found {list(weights.values())}")
        if self._batch_size < 1 or (self._token_budget is not None and self._token_budget < 1) or window < 1:
            raise ValueError(
                f"give batch_size, or token_budget, from 1 on: found batch_size={self._batch_size or None}"
                f" token_budget={self._token_budget} {window=}"
            )
        if self._batch_size % self.world_size:
            raise ValueError(
                f"batch_size={self._batch_size} is of the global batch: {self.world_size} ranks must divide it, so that"
                f" all take equal shares"
            )

    def _refuse_other_layouts(self, names: Sequence[str]) -> None:
        """CacheError where the caches of a mixture store a product in different ways."""
        for reader in self._readers[1:]:
            for name in names:
                first, other = self._readers[0].product(name), reader.product(name)
                if (first.kind, first.layout) != (other.kind, other.layout):
                    raise CacheError(
                        f"{name}: caches of a mixture must store it alike, found {first.layout} and {other.layout}"
                    )

    def _new_plan(self) -> CountPlan | BudgetPlan:
        positions = self._order.num_positions
        if self._token_budget is None:
            return CountPlan(num_positions=positions, batch_size=self._batch_size, tail=self._tail)
        longest = max(int(reader.tokens(slice(None)).max()) for reader in self._readers)
        if longest > self._token_budget:
            raise CacheError(
                f"a clip has {longest} tokens of {self._first.name}, token_budget={self._token_budget}: give a larger"
                f" budget, or leave long clips out by where"
            )
        return BudgetPlan(
            num_positions=positions,
            num_packs=self._batch_size,
            budget=self._token_budget,
            tail=self._tail,
            tokens_of=self._tokens_of,
        )

    def _tokens_of(self, epoch: int, positions_N: np.ndarray) -> np.ndarray:
        """The tokens of the clips at positions of an epoch."""
        sources_N, clips_N = self._order.clips(epoch, positions_N)
        tokens_N = np.empty(len(positions_N), np.int64)
        for source, reader in enumerate(self._readers):
            chosen = sources_N == source
            tokens_N[chosen] = reader.tokens(clips_N[chosen])
        return tokens_N

    def __len__(self) -> int:
        """Steps in the current epoch; with a token budget all its clips are packed to know."""
        return self._plan.num_steps(self.epoch)

    @property
    def num_clips(self) -> int:
        """Clips in an epoch."""
        return self._order.num_positions

    @property
    def epoch(self) -> int:
        """The epoch that is read now, or next."""
        return int(self._shared[0]) if self._own_epoch is None else self._own_epoch

    @property
    def num_skipped(self) -> int:
        """Clips that were left out of batches since their tokens are damaged, in all processes."""
        return int(self._shared[2:].sum())

    @property
    def fill(self) -> float | None:
        """The share of the token budget that packs have used so far; what is left of 1 is waste. None without packs."""
        if not isinstance(self._plan, BudgetPlan) or not self._plan.fill.num_packs:
            return None
        return self._plan.fill.num_tokens / (self._plan.fill.num_packs * self._plan.budget)

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch `epoch` at the next ``for``, unless it is the current one."""
        if epoch != self.epoch:
            self._shared[0] = epoch
            self._own_epoch, self._start, self._step, self._hint = None, 0, 0, (0, 0)
            self._is_begun = self._is_own_start = False

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: after the last batch that it gave.

        CacheError where worker processes have given batches: only a StatefulDataLoader knows which of them came.
        """
        worker = get_worker_info()
        if worker is None and self._shared[1]:
            raise CacheError(
                "batches were read by worker processes of a DataLoader, so the loader does not know where it is: use"
                " torchdata's StatefulDataLoader and its state_dict, or iterate the loader itself"
            )
        of_worker = worker is not None and self._is_begun
        return {
            **self._identity, "epoch": self.epoch, "step": self._step, "hint": list(self._hint), "of_worker": of_worker
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; CacheError where it is of other data, another batch size or another order."""
        remedies = {
            "data": "the cache has changed, or another condition was given: take a snapshot before a training, and open"
            " the cache at it",
        }
        for name, here in self._identity.items():
            if state.get(name) != here:
                raise CacheError(
                    f"the state cannot be loaded: {name} was {state.get(name)}, is {here}:"
                    f" {remedies.get(name, f'give the loader the same {name}')}"
                )
        self._start = self._step = int(state["step"])
        self._hint = (int(state["hint"][0]), int(state["hint"][1]))
        if isinstance(self._plan, BudgetPlan):
            self._plan.use_hint(int(state["epoch"]), self._hint)
        self._is_own_start = bool(state["of_worker"])  # else workers go on at their own distances from the step
        if get_worker_info() is None:
            self._shared[0], self._shared[1] = int(state["epoch"]), 0
        else:
            self._own_epoch = int(state["epoch"])

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        stride, epoch = worker.num_workers if worker else 1, self.epoch
        first = self._start + (worker.id if worker and not self._is_own_start else 0)
        self._start, self._step, self._own_epoch = 0, first, None
        self._is_begun, self._is_own_start, self._shared[1] = True, False, int(worker is not None)
        slot = 2 + (worker.id % SLOTS if worker else SLOTS)
        for block in self._blocks(epoch, first, stride):
            self._hint = block.hint
            self._shared[slot] += block.num_damaged
            for batch in block.batches:
                self._step += stride
                yield batch
        if worker is None:
            self._shared[0] = epoch + 1
            self._step, self._hint = 0, (0, 0)

    def _blocks(self, epoch: int, first: int, stride: int) -> Iterator[_Block]:
        """Blocks of batches, the next ones being fetched, checked and paged in by a thread."""
        reading = self._read_blocks(epoch, first, stride)
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ahead: deque[Future[_Block | None]] = deque()
            while True:
                while len(ahead) < BLOCKS_AHEAD and not self._is_at_hand:
                    ahead.append(thread.submit(next, reading, None))
                block = ahead.popleft().result() if ahead else next(reading, None)
                if block is None:
                    return
                yield block

    @property
    def _is_at_hand(self) -> bool:
        """Whether all is mapped, checked and in memory: a thread would only cost time."""
        return all(reader.is_at_hand for reader in self._readers)

    def _read_blocks(self, epoch: int, first: int, stride: int) -> Iterator[_Block]:
        """Blocks of batches of this rank, of as many steps as may be planned at once; where values have to be read for
        that, in shares. The first ones have few steps, so that they come soon, unless all is at hand.
        """
        bytes_per_step = max(1, self._bytes_per_step())
        is_late = len(self._readers) == 1 and self._readers[0].is_gathered_late
        per_block = PLANNED_CLIPS if is_late else max(1, BLOCK_BYTES // bytes_per_step)
        share = max(1, self._batch_size // self.world_size)
        most = max(1, min(PLANNED_CLIPS // share, PLANNED_BYTES // bytes_per_step))
        num_steps = most if self._is_at_hand else 1
        while True:
            steps_S = np.arange(first, first + num_steps * stride, stride)
            planned = self._plan.positions(epoch, steps_S, self.rank, self.world_size)
            if planned is None:
                return
            hint = self._plan.hint(epoch) if isinstance(self._plan, BudgetPlan) else (0, 0)
            sources_N, clips_N = self._order.clips(epoch, planned.positions_N)
            small, begin = self._small(sources_N, clips_N), 0
            for block in range(0, len(planned.ends_S), per_block):
                ends_S = planned.ends_S[block : block + per_block]
                span = slice(begin, int(ends_S[-1]))
                values, kept_N = self._read(sources_N[span], clips_N[span])
                block_small = {name: column[span] for name, column in small.items()}
                block_ends_S = ends_S - begin
                if len(kept_N) < span.stop - begin:
                    block_small = {name: chosen_rows(column, kept_N) for name, column in block_small.items()}
                    block_ends_S = np.searchsorted(kept_N, block_ends_S)
                batches = self._batches(values, block_small, block_ends_S)
                yield _Block(batches, hint, span.stop - begin - len(kept_N))
                begin = span.stop
            first, num_steps = first + num_steps * stride, min(4 * num_steps, most)

    def _bytes_per_step(self) -> int:
        """Of one rank, about."""
        share = self._batch_size // self.world_size
        per_clip = self._readers[0].bytes_per_clip
        if self._token_budget is not None:
            clips = self._token_budget / max(1.0, float(self._readers[0].tokens(slice(None)).mean()))
            return math.ceil(share * per_clip * clips)
        return share * per_clip

    def _read(self, sources_N: np.ndarray, clips_N: np.ndarray) -> tuple[dict[str, Values], np.ndarray]:
        """The values of clips of several sources, and which of the clips these are."""
        if len(self._readers) == 1:
            values, kept_N = self._readers[0].read(clips_N, skip_damaged=self._skip)
        else:
            parts, places = [], []
            for source, reader in enumerate(self._readers):
                chosen = np.flatnonzero(sources_N == source)
                found, kept = reader.read(clips_N[chosen], skip_damaged=self._skip)
                parts.append(found)
                places.append(chosen[kept])
            order_N = np.argsort(np.concatenate(places))
            values = {name: joined([part[name] for part in parts]).chosen(order_N) for name in parts[0]}
            kept_N = np.concatenate(places)[order_N]
        return values, kept_N

    def _batches(self, values: Mapping[str, Values], small: Mapping[str, Any], ends_S: np.ndarray) -> Iterator[Batch]:
        """The clips of a block, divided into steps; `small` are their ids and columns."""
        bounds = [0, *ends_S.tolist()]
        columns = [column_parts(column, bounds) for column in small.values()]
        names = [*small, *values]
        for parts in zip(*columns, *(one.parts(bounds, pin=self._pin) for one in values.values()), strict=True):
            yield dict(zip(names, parts, strict=True))

    def _small(self, sources_N: np.ndarray, clips_N: np.ndarray) -> dict[str, Any]:
        """Ids, numbers of real frames, and columns of clips."""
        if len(self._readers) == 1:
            return self._readers[0].clips.small(clips_N, self._columns)
        parts = [np.flatnonzero(sources_N == source) for source in range(len(self._readers))]
        found = [
            reader.clips.small(clips_N[part], self._columns) for part, reader in zip(parts, self._readers, strict=True)
        ]
        order_N = np.argsort(np.concatenate(parts))
        columns = {name: chosen_rows(joined_columns([one[name] for one in found]), order_N) for name in found[0]}
        return {**columns, "source": torch.from_numpy(sources_N)}


def check_columns(columns: Sequence[str] | Mapping[str, str], products: Sequence[str]) -> dict[str, str]:
    """SQL expressions by name; CacheError where a name is taken."""
    expressions = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if taken := {"clip_id", "num_valid", "source", *products} & set(expressions):
        raise CacheError(f"columns: {', '.join(sorted(taken))} would be twice in a batch: give them other names")
    return expressions


def _clips_per_run(reader: ClipReader, product: StoredProduct) -> int:
    """Clips of about one row group, which a shuffle by windows moves together."""
    groups = max(1, len(product.groups.value_ends_G))
    return max(1, -(-reader.clips.num_clips // groups))
