"""The token columns of a product's files as one range of addresses: any values are gathered at the speed of memory.

Local files are mapped as they lie. Row groups of remote caches, and of files that other tools have rewritten, are
mapped from a bounded local cache. Whatever is touched for the first time is checked first.
"""

import bisect
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from isal import isal_zlib

from ..schemas.errors import REPAIR_REMEDY, CacheError
from .address_range import AddressRange, pages
from .byte_ranges import ByteRange, opened, read_ranges
from .local_cache import LocalCache
from .mapped_values import MappedColumn, runs
from .row_groups import ranges_between, read_values
from .storage import Folder, storage_errors
from .stored_product import StoredProduct

log = logging.getLogger(__name__)

MOST_MAPPED = 16384  # files; on Linux a process may have 65,530 maps
MOST_MAPPED_BYTES = 1 << 30  # of row groups in the local cache: those that are mapped keep their room on the disk
THREADS = 16
DOWNLOADS = 3  # of the same bytes, before they are called damaged where they lie


class _Damaged(CacheError):
    """Tokens are not what was committed."""


class MappedTokens:
    """Gathers values of a product by number, from some of its token columns; it travels without its maps.

    Any thread may read, one at a time.
    """

    def __init__(
        self, folder: Folder, product: StoredProduct, columns: Sequence[str], local: LocalCache, *, verify: bool = True
    ) -> None:
        self._product, self._columns, self._local, self._verify = product, tuple(columns), local, verify
        self._groups = product.groups
        self._values_G = np.diff(self._groups.value_ends_G, prepend=0)
        self._sizes = {column: self._values_G * product.widths[column] for column in self._columns}
        self._ends: list[int] = self._groups.value_ends_G.tolist()
        self._widths = [(column, product.widths[column]) for column in self._columns]
        self._use(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_reopened, verify=self._verify), (self._folder.url, self._product, self._columns, self._local)

    def _use(self, folder: Folder) -> None:
        """Begin with nothing mapped. Every local file has a place, and so has every row group that is read alone."""
        groups, shape = self._groups, (len(self._columns), len(self._values_G))
        self._folder, self._pid, self._lock = folder, os.getpid(), threading.Lock()
        self._ready, self._checked, self._is_alone = (np.zeros(shape, bool) for _ in range(3))
        self._is_ready_G, self._damaged_G = np.zeros(shape[1], bool), np.zeros(shape[1], bool)
        self._is_all_ready = self._was_in_memory = False
        self._mapped: dict[int, int] = {}  # the size of what is mapped, by place
        self._mapped_alone_bytes = 0
        paged_F = pages(groups.sizes_F) if folder.is_local else np.zeros_like(groups.sizes_F)
        self._file_places_F = np.cumsum(paged_F) - paged_F
        self._places = np.zeros(shape, np.int64)
        total = int(paged_F.sum())
        for i, column in enumerate(self._columns):
            offsets_G = groups.offsets[column]
            self._is_alone[i] = (offsets_G < 0) | (not folder.is_local)
            paged_G = np.where(self._is_alone[i], pages(self._sizes[column]), 0)
            in_files_G = self._file_places_F[groups.files_G] + offsets_G
            self._places[i] = np.where(self._is_alone[i], total + np.cumsum(paged_G) - paged_G, in_files_G)
            total += int(paged_G.sum())
        self._is_steady = not self._is_alone.any() and len(groups.names_F) <= MOST_MAPPED // 2
        # Where value 0 would lie if each row group reached back to it.
        widths = np.array([[width] for _, width in self._widths])
        self._origins = self._places - (groups.value_ends_G - self._values_G) * widths
        self._origins_of: list[list[int]] = self._origins.tolist()
        self._range = AddressRange(total)
        self._checked_files: set[int] = set()

    @property
    def is_steady(self) -> bool:
        """Whether whatever is mapped stays so: where all is in local files, and in no more than may be mapped."""
        return self._is_steady

    @property
    def is_at_hand(self) -> bool:
        """Whether everything is mapped and checked, and the values of last time were in memory."""
        return self._is_all_ready and self._was_in_memory and self.is_steady

    def mapped(
        self, firsts_N: np.ndarray, counts_N: np.ndarray | None = None, *, skip_damaged: bool = False
    ) -> tuple[dict[str, MappedColumn], np.ndarray]:
        """Values of clips by column, mapped, checked and in memory, to be gathered later: of a product that is steady.

        Also which clips (N,) are damaged, as `read` has it: their values are not to be gathered.
        """
        with self._own_lock():
            groups_N = np.searchsorted(self._groups.value_ends_G, firsts_N, side="right")
            if not (self._is_all_ready or self._is_ready_G[groups_N].all()):
                self._prepare(np.unique(groups_N), skip_damaged=skip_damaged)
            columns = {
                column: MappedColumn(self._range, width, places_V)
                for column, width, places_V in self._places_by_column(groups_N, firsts_N, counts_N)
            }
            damaged_N = self._damaged_G[groups_N]
            if not damaged_N.any():
                self._was_in_memory = all([column.page_in() for column in columns.values()])
            return columns, damaged_N

    def read(
        self, firsts_N: np.ndarray, counts_N: np.ndarray | None = None, *, skip_damaged: bool = False
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The bytes (values, width) of each column, of clips whose values begin at numbers `firsts_N`.

        `counts_N` are the values of each clip, 1 without. Also which clips (N,) were left out since their tokens are
        damaged: none without `skip_damaged`, then CacheError names file, row group and remedy.
        """
        with self._own_lock():
            groups_N = np.searchsorted(self._groups.value_ends_G, firsts_N, side="right")
            if self._is_all_ready or self._is_ready_G[groups_N].all():
                return self._gathered(groups_N, firsts_N, counts_N), np.zeros(len(firsts_N), bool)
            return self._read_new(groups_N, firsts_N, counts_N, skip_damaged=skip_damaged)

    def reader_of_one(self, dtype: np.dtype, shape: tuple[int, ...]) -> Callable[[int], np.ndarray | None]:
        """A function from the number of a value to a copy of it, from the first column of a product that `is_steady`.

        It gives None where the value has to be mapped first, by `read_one`.
        """
        ends, origins, buffer, width = self._ends, self._origins_of[0], self._range.buffer, self._widths[0][1]
        is_ready = self._is_ready_G.data

        def value_at(first: int) -> np.ndarray | None:
            group = bisect.bisect_right(ends, first)
            return np.ndarray(shape, dtype, buffer, origins[group] + first * width).copy() if is_ready[group] else None

        return value_at

    def read_one(self, first: int, count: int = 1) -> dict[str, np.ndarray]:
        """As `read`, of one clip: the bytes (count, width) of each column; the way to few clips."""
        group = bisect.bisect_right(self._ends, first)
        if not self._is_ready_G[group] or not self.is_steady:
            return self.read(np.array([first]), np.array([count]))[0]
        found = {}
        for i, (column, width) in enumerate(self._widths):
            place = self._origins_of[i][group] + first * width
            found[column] = self._range.bytes[place : place + count * width].copy().reshape(count, width)
        return found

    def _read_new(
        self, groups_N: np.ndarray, firsts_N: np.ndarray, counts_N: np.ndarray | None, *, skip_damaged: bool
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `read`, where row groups have to be mapped: as many at a time as may be."""
        parts = list(self._parts(np.unique(groups_N)))
        if len(parts) == 1:
            self._prepare(parts[0], skip_damaged=skip_damaged)
            good_N = ~self._damaged_G[groups_N]
            if good_N.all():
                return self._gathered(groups_N, firsts_N, counts_N), ~good_N
        sizes_N = np.ones(len(firsts_N), np.int64) if counts_N is None else counts_N
        planes = {c: np.empty((int(sizes_N.sum()), self._product.widths[c]), np.uint8) for c in self._columns}
        begins_N, whole_N = np.cumsum(sizes_N) - sizes_N, np.zeros(len(firsts_N), bool)
        for part in parts:
            self._prepare(part, skip_damaged=skip_damaged)
            chosen = np.flatnonzero(np.isin(groups_N, part) & ~self._damaged_G[groups_N])
            found = self._gathered(groups_N[chosen], firsts_N[chosen], sizes_N[chosen])
            for column, plane in found.items():
                planes[column][runs(begins_N[chosen], sizes_N[chosen])] = plane
            whole_N[chosen] = True
        kept = runs(begins_N[whole_N], sizes_N[whole_N])
        return {column: plane[kept] for column, plane in planes.items()}, ~whole_N

    def _own_lock(self) -> threading.Lock:
        """The lock of this process: after a fork neither a lock that was held nor a client of a store is of use."""
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
            if not self._folder.is_local:
                self._use(Folder(self._folder.url))
        return self._lock

    def _gathered(
        self, groups_N: np.ndarray, firsts_N: np.ndarray, counts_N: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        found = {}
        for column, width, places_V in self._places_by_column(groups_N, firsts_N, counts_N):
            found[column] = self._range.rows(width)[places_V].view(np.dtype((np.uint8, width)))
        return found

    def _places_by_column(
        self, groups_N: np.ndarray, firsts_N: np.ndarray, counts_N: np.ndarray | None
    ) -> Iterator[tuple[str, int, np.ndarray]]:
        """Name and width of each column, and the place of every value (V,) in it."""
        for i, (column, width) in enumerate(self._widths):
            places_N = self._origins[i].take(groups_N) + firsts_N * width
            yield column, width, places_N if counts_N is None else runs(places_N, counts_N, width)

    def _parts(self, groups: np.ndarray) -> Iterator[np.ndarray]:
        """The groups in parts that may be mapped together: files all at once, row groups of the local cache by size."""
        alone_bytes = sum(
            np.where(self._is_alone[i, groups], self._sizes[column][groups], 0)
            for i, column in enumerate(self._columns)
        )
        numbers = np.cumsum(alone_bytes) // (self._most_bytes // 2)
        yield from np.split(groups, np.flatnonzero(np.diff(numbers)) + 1)

    @property
    def _most_bytes(self) -> int:
        """Of row groups in the local cache that are mapped, about."""
        return max(2, min(MOST_MAPPED_BYTES, self._local.limit_bytes // 4))

    def _prepare(self, part: np.ndarray, *, skip_damaged: bool) -> None:
        """Map and check row groups; their damage is raised, or noted."""
        part = part[~self._damaged_G[part]]
        if self._mapped_alone_bytes > self._most_bytes // 2 or len(self._mapped) > MOST_MAPPED // 2:
            self._unmap_all()
        files = np.unique(self._groups.files_G[part]).tolist()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="tokens") as pool:
            self._note(pool.map(self._prepare_file, files), skip_damaged=skip_damaged)
            part = part[~self._damaged_G[part]]
            new = [(i, g) for i in range(len(self._columns)) for g in part[~self._ready[i, part]].tolist()]
            self._note(pool.map(self._prepare_group, new), skip_damaged=skip_damaged)
        self._ready.all(axis=0, out=self._is_ready_G)
        self._is_all_ready = bool(self._is_ready_G.all())

    def _note(self, problems: Iterable[tuple[np.ndarray, str] | None], *, skip_damaged: bool) -> None:
        for groups, problem in filter(None, problems):
            if not skip_damaged:
                raise CacheError(problem)
            if not self._damaged_G[groups].all():
                log.warning("event=damaged_tokens_left_out problem=%r", problem)
            self._damaged_G[groups] = True

    def _prepare_file(self, file: int) -> tuple[np.ndarray, str] | None:
        """Map a local file, and check what it holds besides tokens; what is wrong, and for which row groups."""
        name, size = self._groups.names_F[file], int(self._groups.sizes_F[file])
        groups = np.arange(*np.searchsorted(self._groups.files_G, [file, file + 1]))
        is_mapped_whole = not self._is_alone[0, groups[0]]
        if is_mapped_whole and int(self._file_places_F[file]) not in self._mapped:
            with storage_errors(self._folder.uri(name)), open(self._folder.path(name), "rb") as stream:
                found = os.fstat(stream.fileno()).st_size
                if found != size:
                    return groups, f"{self._folder.uri(name)}: {found} bytes, committed {size}: {REPAIR_REMEDY}"
                self._map(int(self._file_places_F[file]), stream.fileno(), size)
        try:
            self._check_rest(file, groups)
        except _Damaged as error:
            return groups, str(error)
        return None

    def _check_rest(self, file: int, groups: np.ndarray) -> None:
        """Compare the digest of all that a file holds besides tokens, unless another tool has rewritten it."""
        wanted, name = self._groups.rest_sha256_F[file], self._groups.names_F[file]
        if not self._verify or not wanted or file in self._checked_files:
            return
        offsets = {column: offsets_G[groups] for column, offsets_G in self._groups.offsets.items()}
        if min(map(np.min, offsets.values())) < 0:
            return
        spans = [
            (int(offset), int(values) * self._product.widths[column])
            for column, offsets_G in offsets.items()
            for offset, values in zip(offsets_G, self._values_G[groups], strict=True)
        ]
        between = ranges_between(spans, int(self._groups.sizes_F[file]))
        ranges = [ByteRange(name, begin, end - begin) for begin, end in between]

        def check() -> bytes:
            if self._downloaded(ranges, lambda data: hashlib.sha256(data).hexdigest() == wanted) is None:
                raise _Damaged(
                    f"{self._folder.uri(name)}: damaged besides its tokens (headers, small columns or footer; its"
                    f" SHA-256 does not match): {REPAIR_REMEDY}"
                )
            return b"1"

        if self._folder.is_local:
            check()
        else:  # once for all processes of this machine
            os.close(self._local.open(f"{self._folder.uri(name)}#checked", 1, check))
        self._checked_files.add(file)

    def _prepare_group(self, one: tuple[int, int]) -> tuple[np.ndarray, str] | None:
        """Map a column of a row group, and check it; what is wrong."""
        i, group = one
        try:
            if self._is_alone[one]:
                self._map_alone(i, group)
            elif not self._is_whole(i, group):
                raise self._damaged(i, group)
        except _Damaged as error:
            return np.array([group]), str(error)
        self._ready[one] = self._checked[one] = True
        return None

    def _map_alone(self, i: int, group: int) -> None:
        """Map a column of a row group from the local cache; what is damaged there is fetched anew, once."""
        place, size = int(self._places[i, group]), int(self._sizes[self._columns[i]][group])
        if place in self._mapped:
            return
        key = f"{self._uri(group)}#{self._groups.numbers_G[group]}.{self._columns[i]}"
        for _ in range(2):
            descriptor = self._local.open(key, size, lambda: self._fetched(i, group))
            try:
                self._map(place, descriptor, size)
            finally:
                os.close(descriptor)
            if self._is_whole(i, group):
                self._mapped_alone_bytes += size
                return
            self._mapped.pop(place)
            self._local.discard(key)
        raise CacheError(
            f"{key}: damaged in the local cache {self._local.folder} as soon as it is written: check the disk"
        )

    def _fetched(self, i: int, group: int) -> bytes:
        """The bytes of a column of a row group, from where the cache lies."""
        column, name = self._columns[i], self._groups.names_F[self._groups.files_G[group]]
        offset, wanted = int(self._groups.offsets[column][group]), int(self._groups.checksums[column][group])
        if offset < 0:
            number = int(self._groups.numbers_G[group])
            try:
                with opened(self._folder, name, partial(read_values, row_group=number, column=column)) as data:
                    return data
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(i, group, f"{error}") from None
        ranges = [ByteRange(name, offset, int(self._sizes[column][group]))]
        data = self._downloaded(ranges, lambda data: not self._verify or wanted < 0 or isal_zlib.crc32(data) == wanted)
        if data is None:
            raise self._damaged(i, group)
        return data

    def _downloaded(self, ranges: Sequence[ByteRange], is_right: Callable[[bytes], bool]) -> bytes | None:
        """The bytes of some ranges once they are right; None where they never are."""
        for _ in range(DOWNLOADS):
            with contextlib.suppress(CacheError):  # too short
                data = b"".join(read_ranges(self._folder, ranges)[0])
                if is_right(data):
                    return data
        return None

    def _is_whole(self, i: int, group: int) -> bool:
        """Whether the mapped bytes of a column of a row group are what was committed, unless that is known."""
        wanted = int(self._groups.checksums[self._columns[i]][group])
        if not self._verify or wanted < 0 or self._checked[i, group]:
            return True
        place, size = int(self._places[i, group]), int(self._sizes[self._columns[i]][group])
        return isal_zlib.crc32(self._range.bytes[place : place + size].data) == wanted

    def _damaged(self, i: int, group: int, reason: str = "its CRC-32 does not match") -> _Damaged:
        return _Damaged(
            f"{self._uri(group)}: row group {self._groups.numbers_G[group]} of column {self._columns[i]} is damaged"
            f" ({reason}): {REPAIR_REMEDY}"
        )

    def _uri(self, group: int) -> str:
        return self._folder.uri(self._groups.names_F[self._groups.files_G[group]])

    def _map(self, place: int, descriptor: int, size: int) -> None:
        self._range.map(place, descriptor, size)
        self._mapped[place] = size

    def _unmap_all(self) -> None:
        for place, size in self._mapped.items():
            self._range.unmap(place, size)
        self._mapped.clear()
        self._mapped_alone_bytes = 0
        self._ready[:] = self._is_ready_G[:] = self._is_all_ready = False


def _reopened(url: str, *arguments: Any, verify: bool) -> MappedTokens:
    return MappedTokens(Folder(url), *arguments, verify=verify)
