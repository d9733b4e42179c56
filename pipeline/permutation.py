"""Permutations of the numbers below any size that are computed, not stored: a Feistel network over two digits, walked
until it is below the size (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import math

import numpy as np

ROUNDS = 4
_END = 1 << 64
_MULTIPLIERS = {  # of 32 bits: Wellons' triple32 and lowbias32; of 64 bits: SplitMix64
    32: (np.uint32(0xED5AD4BB), np.uint32(0xAC4C1B51)),
    64: (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)),
}


def permuted(numbers_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of 0..size-1 puts each of `numbers_N`, int64 (N,): O(1) memory whatever the size.

    `key`, of 64 bits, says which permutation.
    """
    base = math.isqrt(size - 1) + 1  # digits of about the same size, and hardly more numbers than are asked for
    found_N = _network(numbers_N, base, -(-size // base), key)
    outside = np.flatnonzero(found_N >= size)
    while outside.size:
        found_N[outside] = _network(found_N[outside], base, -(-size // base), key)
        outside = outside[found_N[outside] >= size]
    return found_N


def _network(numbers_N: np.ndarray, base: int, num_high: int, key: int) -> np.ndarray:
    """A permutation of the numbers below base * num_high: each digit in turn is moved on by a hash of the other."""
    kind = np.uint32 if base < 1 << 16 else np.uint64  # numbers of 32 bits are hashed in half the time
    high, low = (digit.astype(kind) for digit in np.divmod(numbers_N, base))
    for i in range(0, ROUNDS, 2):
        _add_hash(low, base, high, _mixed(key + i))
        _add_hash(high, num_high, low, _mixed(key + i + 1))
    found_N = high.astype(np.int64)
    found_N *= base
    found_N += low.astype(np.int64)
    return found_N


def _add_hash(digits_N: np.ndarray, size: int, others_N: np.ndarray, key: int) -> None:
    """Move each digit on, modulo `size`, by a hash of its other digit."""
    kind, bits = digits_N.dtype.type, 8 * digits_N.itemsize
    half, (first, second) = kind(bits // 2), _MULTIPLIERS[bits]
    hashed_N = others_N + kind(key % (1 << bits))
    hashed_N *= first
    hashed_N ^= hashed_N >> half
    hashed_N *= second
    hashed_N >>= half
    hashed_N *= kind(size)
    hashed_N >>= half
    digits_N += hashed_N
    digits_N -= kind(size) * (digits_N >= size)


def _mixed(value: int) -> int:
    """A number of 64 bits as one that looks random: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value %= _END
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % _END
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % _END
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """A key of 64 bits, of whole numbers in their order."""
    key = 0
    for part in parts:
        key = _mixed(key + part + 0x9E3779B97F4A7C15)
    return key
