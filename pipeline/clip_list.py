"""The clips that a loader reads: where their tokens begin in every product, and columns of SQL, memory-mapped from one
file that all ranks and workers of a machine share.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch

from ..schemas.digest import digest_of
from ..schemas.errors import REPAIR_REMEDY, CacheError
from .cache import TokenCache
from .places import user_cache_folder
from .relevance_views import NAMES_RELEVANCE, RELEVANCE
from .storage import storage_errors, written_aside
from .stored_product import StoredProduct
from .views import CLIPS_WITH_VIDEOS

REVISION = 3  # rises with every change of the file
MOST_KEPT, KEPT_S = 64, 30 * 86400  # lists that stay on disk
ID_BYTES = 16
_ID = np.dtype((np.void, ID_BYTES))
DIGEST = b"tokenmill.digest"


class ClipIds(Sequence[str]):
    """Ids of clips: a sequence of texts of 32 hex digits, made when they are asked for; ``list(ids)`` makes all."""

    __slots__ = ("_stored",)

    def __init__(self, ids: np.ndarray | Iterable[str]) -> None:
        """Of voids (N,) of 16 bytes, or of the texts themselves, as a DataLoader makes anew whatever it is given."""
        if not isinstance(ids, np.ndarray):
            ids = np.frombuffer(bytes.fromhex("".join(ids)), _ID)
        self._stored = ids

    @classmethod
    def joined(cls, parts: Sequence["ClipIds"]) -> "ClipIds":
        """Those of all parts, one after the other."""
        return cls(np.concatenate([part._stored for part in parts]))

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "ClipIds": ...
    def __getitem__(self, index: int | slice | np.ndarray) -> "str | ClipIds":
        if isinstance(index, (slice, np.ndarray)):
            return ClipIds(self._stored[index])
        return self._stored[index].tobytes().hex()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.tobytes().hex(" ", ID_BYTES).split())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class ClipList:
    """Clips in the order in which the first product has them in its files; their numbers count from 0.

    `products` are those whose values it places. It is mapped when it is first asked, in whatever process that is.
    """

    path: str
    products: tuple[str, ...]

    @cached_property
    def _table(self) -> pa.Table:
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it is in use
        return pa.ipc.open_file(pa.memory_map(self.path)).read_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipList, (self.path, self.products)

    @cached_property
    def digest(self) -> str:
        """What it says: the files of each product, and which of their clips are read."""
        return self._table.schema.metadata[DIGEST].decode()

    @property
    def num_clips(self) -> int:
        """How many clips there are."""
        return self._table.num_rows

    @cached_property
    def num_valid(self) -> np.ndarray:
        """The frames of each clip that are real."""
        return self._numbers("num_valid")

    @cached_property
    def firsts(self) -> list[np.ndarray]:
        """The number of the first value of each clip in each product."""
        return [self._numbers(f"first_{i}") for i in range(len(self.products))]

    @cached_property
    def counts(self) -> list[np.ndarray | None]:
        """The values of each clip in each product; None where each clip has one."""
        names = [f"count_{i}" for i in range(len(self.products))]
        return [self._numbers(name) if name in self._table.column_names else None for name in names]

    def _numbers(self, name: str) -> np.ndarray:
        column = self._table[name]
        return column.chunk(0).to_numpy(zero_copy_only=True) if column.num_chunks else np.zeros(0, np.int64)

    @cached_property
    def _ids(self) -> np.ndarray:
        column = self._table["clip_id"]
        data = column.chunk(0).buffers()[1] if column.num_chunks else b""
        return np.frombuffer(data, _ID)[: self.num_clips]

    def ids(self, clips_N: np.ndarray) -> "ClipIds":
        """The ids of clips by number."""
        return ClipIds(self._ids.take(clips_N))

    @cached_property
    def column_names(self) -> list[str]:
        """The columns that were asked for."""
        return json.loads(self._table.schema.metadata[b"tokenmill.columns"])

    @cached_property
    def _of_one(self) -> tuple[memoryview, memoryview]:
        """The bytes of ids, and numbers of real frames: of single clips in a quarter of numpy's time."""
        return self._ids.view(np.uint8).data, self.num_valid.data

    def head(self, clip: int) -> dict[str, Any]:
        """What a sample has of one clip besides tokens and columns: ``clip_id`` and ``num_valid``."""
        ids, num_valid = self._of_one
        begin = clip * ID_BYTES
        return {"clip_id": ids[begin : begin + ID_BYTES].hex(), "num_valid": num_valid[clip]}

    def small(self, clips_N: np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
        """What a batch has of clips besides tokens: ``clip_id``, ``num_valid`` and `columns`."""
        return {
            "clip_id": self.ids(clips_N),
            "num_valid": torch.from_numpy(self.num_valid.take(clips_N)),
            **{name: self.column(name, clips_N) for name in columns},
        }

    def column(self, name: str, clips_N: np.ndarray) -> torch.Tensor | list[Any]:
        """A column of clips by number: a tensor of numbers, else a list; also where numbers may be absent."""
        values = self._columns[name]
        return torch.from_numpy(values[clips_N]) if isinstance(values, np.ndarray) else values.take(clips_N).to_pylist()

    @cached_property
    def _columns(self) -> dict[str, np.ndarray | pa.Array]:
        found: dict[str, np.ndarray | pa.Array] = {}
        for i, name in enumerate(self.column_names):
            column = self._table[f"column_{i}"]
            values = column.chunk(0) if column.num_chunks else pa.array([], column.type)
            kind = values.type
            is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            found[name] = values.to_numpy(zero_copy_only=False) if is_number and not values.null_count else values
        return found


def joined_columns(parts: list[Any]) -> Any:
    """A column of several caches: a tensor where all have numbers."""
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat(parts)
    if isinstance(parts[0], ClipIds):
        return ClipIds.joined(parts)
    return [one for part in parts for one in part]


def column_parts(column: Any, bounds: Sequence[int]) -> Sequence[Any]:
    """The rows between each two of `bounds`, which begin at 0 and end with the last row."""
    spans = itertools.pairwise(bounds)
    if isinstance(column, torch.Tensor):
        return column.split([end - begin for begin, end in spans])
    return [column[begin:end] for begin, end in spans]


def chosen_rows(column: Any, places_N: np.ndarray) -> Any:
    """Some rows of a column."""
    if isinstance(column, torch.Tensor):
        return column[torch.from_numpy(places_N)]
    if isinstance(column, ClipIds):
        return column[places_N]
    return [column[i] for i in places_N.tolist()]


def list_clips(
    cache: TokenCache, products: Sequence[StoredProduct], where: str, columns: Mapping[str, str]
) -> ClipList:
    """The clips of a cache that have all `products` and for which the SQL condition `where` holds.

    `columns` are SQL expressions over clips and their videos, by name. The list is found on this machine's disk where
    it was made before of the same state. CacheError says what is wrong with SQL, or that no clip is left.
    """
    state = cache.sql("select value from meta where key = 'state'")["value"][0].as_py()
    if NAMES_RELEVANCE.search(" ".join([where, *columns.values()])):
        state = digest_of([state, cache.folder.list(RELEVANCE)])
        cache.refresh()  # later, so that a list is never of less than its name says
    names = tuple(product.name for product in products)
    key = digest_of([REVISION, cache.folder.url, state, names, where, dict(columns)])
    path = os.path.join(user_cache_folder("clips"), f"{key[:32]}.arrow")
    with storage_errors(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{os.path.dirname(path)}/lock-{key[:2]}", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine makes it, the others wait for it
            if not os.path.exists(path):
                _write(path, _listed(cache, products, where, columns))
                _forget_old(os.path.dirname(path))
    return ClipList(path, names)


def _write(path: str, table: pa.Table) -> None:
    with written_aside(path) as aside, pa.OSFile(aside, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _forget_old(folder: str) -> None:
    """Remove lists that nothing has mapped for a month, but for the newest ones."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append((entry.stat().st_mtime, entry.path))
    for modified_s, path in sorted(found)[:-MOST_KEPT]:
        if path.endswith(".arrow") and modified_s < time.time() - KEPT_S:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _listed(cache: TokenCache, products: Sequence[StoredProduct], where: str, columns: Mapping[str, str]) -> pa.Table:
    """The clips as a table of one chunk: clip_id, num_valid, first_<i> and count_<i> of each product, the columns."""
    chosen = "".join(f", {expression}\n as _column_{i}" for i, expression in enumerate(columns.values()))
    rows = ", ".join(f"f{i}.first_row + l{i}.row_in_file as _row_{i}" for i in range(len(products)))
    joins = " ".join(
        f"""join locations l{i} on l{i}.product = '{product.name}' and l{i}.clip_id = c._clip::uuid
            join file_starts f{i} on f{i}.name = l{i}.name"""
        for i, product in enumerate(products)
    )
    starts = pa.concat_tables([product.file_starts for product in products])
    table = cache.answer(
        f"""select unhex(_clip) as _id, _num_valid, {rows}, c.* exclude (_clip, _num_valid)
            from (select c.clip_id as _clip, c.num_valid::bigint as _num_valid{chosen}
                  from {CLIPS_WITH_VIDEOS} c where ({where}\n)) c {joins} order by _row_0""",
        file_starts=starts,
    )
    if not table.num_rows:
        raise CacheError(
            f"{cache.folder.url}: no clip has {', '.join(p.name for p in products)} where {where}: tokenmill status"
            f" says what was made"
        )
    arrays = {
        "clip_id": table["_id"].combine_chunks().cast(pa.binary(ID_BYTES)),
        "num_valid": table["_num_valid"].combine_chunks(),
    }
    digest = hashlib.sha256(json.dumps([[p.name, p.file_starts["name"].to_pylist()] for p in products]).encode())
    for i, product in enumerate(products):
        rows_N = table[f"_row_{i}"].to_numpy()
        digest.update(np.ascontiguousarray(rows_N).data)
        counts_R = product.counts(cache)
        if counts_R is None:
            arrays[f"first_{i}"] = pa.array(rows_N)
        else:
            arrays[f"first_{i}"] = pa.array((np.cumsum(counts_R) - counts_R)[rows_N])
            arrays[f"count_{i}"] = pa.array(counts_R[rows_N])
            if counts_R.sum(dtype=np.int64) != product.groups.value_ends_G[-1]:
                raise CacheError(
                    f"{product.name}: clips have {counts_R.sum(dtype=np.int64)} values by its small columns,"
                    f" {product.groups.value_ends_G[-1]} by footers: a file is damaged: {REPAIR_REMEDY}"
                )
    arrays |= {f"column_{i}": _one_chunk(table[f"_column_{i}"]) for i in range(len(columns))}
    metadata = {DIGEST: digest.hexdigest(), b"tokenmill.columns": json.dumps(list(columns))}
    return pa.table(arrays).replace_schema_metadata(metadata)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, whatever its texts weigh."""
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    return column.combine_chunks()
