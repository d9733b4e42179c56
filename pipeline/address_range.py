"""A range of addresses that files are mapped into, so that bytes of many files are gathered by one list of places."""

import ctypes
import mmap
import os
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..schemas.errors import StorageError

PAGE = mmap.ALLOCATIONGRANULARITY
MOST_BUFFERS = 16
SAMPLED = 32  # places of many, to see whether they are in memory
THREADS = 16
_FAILED = ctypes.c_void_p(-1).value
_NONE, _FIXED = 0, 0x10  # PROT_NONE and MAP_FIXED, the same on Linux and macOS
_UNBACKED = (
    mmap.MAP_PRIVATE
    | mmap.MAP_ANONYMOUS
    | getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0x40)
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class AddressRange:
    """`size` bytes of addresses, none of which can be read until a file is mapped there.

    Reading elsewhere ends the process, as any wrong address does: callers map first. Files stay mapped in forked
    processes.
    """

    def __init__(self, size: int) -> None:
        self.size = pages(max(size, 1))
        self._base = _mapped(None, self.size, _NONE, _UNBACKED, -1)
        # Not at the end of the process: threads may still be reading.
        weakref.finalize(self, _libc.munmap, self._base, self.size).atexit = False
        self.buffer = (ctypes.c_uint8 * self.size).from_address(self._base)
        self.bytes = np.frombuffer(self.buffer, np.uint8)
        self.buffers = Buffers()
        self._rows_of: dict[int, np.ndarray] = {}

    def map(self, place: int, descriptor: int, size: int) -> None:
        """Let the first `size` bytes of an open file be read at `place`, a multiple of PAGE; it may be closed then."""
        _mapped(self._base + place, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor)

    def unmap(self, place: int, size: int) -> None:
        """Give back what was mapped at `place`."""
        _mapped(self._base + place, pages(size), _NONE, _UNBACKED | _FIXED, -1)

    def rows(self, width: int) -> np.ndarray:
        """Values of `width` bytes, as voids, one from every place on: ``rows(width)[places_N]`` copies some."""
        if width not in self._rows_of:
            kind = np.dtype((np.void, width))
            self._rows_of[width] = np.ndarray(max(0, self.size - width + 1), kind, self.buffer, 0, (1,))
            self._rows_of[width].flags.writeable = False
        return self._rows_of[width]

    def page_in(self, places_N: np.ndarray, width: int) -> bool:
        """Have the bytes at each place in memory: unless a sample of them was, by many threads that read the disk."""
        sample_N = places_N[:: max(1, len(places_N) // SAMPLED)]
        if all(self._is_resident(int(place)) for place in sample_N):
            return True
        pages_N = (places_N[:, None] + np.append(np.arange(0, width, PAGE), width - 1)).reshape(-1)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="page_in") as pool:
            list(pool.map(self.bytes.take, np.array_split(pages_N, THREADS)))
        return False

    def _is_resident(self, place: int) -> bool:
        state = ctypes.c_ubyte()
        failed = _libc.mincore(self._base + place // PAGE * PAGE, 1, ctypes.byref(state))
        return bool(failed or state.value & 1)


class Buffers:
    """Memory for what is gathered, used again once nobody holds a batch in it: fresh memory costs more than copying."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """An array (size,) uint8 of any content."""
        for i in range(len(self._held)):
            if sys.getrefcount(self._held[i]) == 2:  # the list's, and that of the call
                if self._held[i].size < size:
                    self._held[i] = np.empty(size, np.uint8)
                return self._held[i][:size]
        self._held = [*self._held[1 - MOST_BUFFERS :], np.empty(size, np.uint8)]
        return self._held[-1][:size]


def pages(size: Any) -> Any:
    """A size, or an array of sizes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _mapped(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        raise StorageError(
            f"{size} bytes of addresses were asked for: {os.strerror(ctypes.get_errno())}: raise the limits of this"
            f" process (ulimit -v) and of its maps (vm.max_map_count)"
        )
    return found
