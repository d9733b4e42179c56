"""A range of addresses that files are mapped into, so that bytes of many files are gathered by one list of places."""

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np

from ..schemas.errors import StorageError

PAGE = mmap.ALLOCATIONGRANULARITY
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
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class AddressRange:
    """`size` bytes of addresses, none of which can be read until a file is mapped there.

    Reading elsewhere ends the process, as any wrong address does: callers map first. Files stay mapped in forked
    processes.
    """

    def __init__(self, size: int) -> None:
        self.size = pages(max(size, 1))
        self._base = _mapped(None, self.size, _NONE, _UNBACKED, -1)
        weakref.finalize(self, _libc.munmap, self._base, self.size)
        self.bytes = np.frombuffer((ctypes.c_uint8 * self.size).from_address(self._base), np.uint8)

    def map(self, place: int, descriptor: int, size: int) -> None:
        """Let the first `size` bytes of an open file be read at `place`, a multiple of PAGE; it may be closed then."""
        _mapped(self._base + place, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor)

    def unmap(self, place: int, size: int) -> None:
        """Give back what was mapped at `place`."""
        _mapped(self._base + place, pages(size), _NONE, _UNBACKED | _FIXED, -1)

    def gather(self, places_N: np.ndarray, width: int) -> np.ndarray:
        """A copy (N, width) uint8 of the bytes at each place; other threads run meanwhile."""
        if not width or not places_N.size:
            return np.zeros((len(places_N), width), np.uint8)
        windows = np.lib.stride_tricks.as_strided(self.bytes, (self.size - width + 1, width), (1, 1), writeable=False)
        return windows[places_N]


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
