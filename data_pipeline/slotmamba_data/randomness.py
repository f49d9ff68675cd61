"""Random numbers as a pure function of a key: SplitMix64 streams, the same on every machine and NumPy version.

NumPy's `Generator` may change what it draws between versions; the order of a run's data may not. SplitMix64 (Steele,
Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) is a counter through a 64-bit mixer: draw j
of any stream is computed alone, and many streams at once are one vectorised expression.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: str | int) -> np.uint64:
    """A 64-bit key that depends on every part: two calls agree only if they name the same parts."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def random_bits(keys: np.ndarray | np.uint64, count: int, first: int = 0) -> np.ndarray:
    """Draws `first` to `first + count - 1` of the stream of each key.

    Args:
        keys: uint64 [...], one stream each.
        count: draws of each stream.
        first: number of the first draw.

    Returns:
        uint64 [..., count], uniform.
    """
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
    bits = np.asarray(keys, dtype=np.uint64)[..., None] + counters
    bits ^= bits >> np.uint64(30)
    bits *= _MIX_1
    bits ^= bits >> np.uint64(27)
    bits *= _MIX_2
    bits ^= bits >> np.uint64(31)
    return bits


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers of the open interval (0, 1): float64 [..., count]."""
    return ((random_bits(keys, count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def distinct(keys: np.ndarray, size: int, count: int) -> np.ndarray:
    """`count` different numbers of 0 to size-1 for each key, uniform and in random order: int64 [streams, count].

    They are the first different ones of the key's stream, so the draws of one key never depend on the other keys.
    """
    assert keys.ndim == 1 and 0 < count <= size
    draws = 2 * count
    while True:
        numbers = (random_bits(keys, draws) % np.uint64(size)).astype(np.int64)
        order = np.argsort(numbers, axis=1, kind="stable")
        ordered = np.take_along_axis(numbers, order, axis=1)
        repeated = np.zeros(numbers.shape, dtype=bool)
        np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if (np.count_nonzero(~repeated, axis=1) >= count).all():
            new = np.argsort(repeated, axis=1, kind="stable")[:, :count]
            return np.take_along_axis(numbers, new, axis=1)
        draws *= 2


def permutation(key: np.uint64, size: int) -> np.ndarray:
    """A uniform permutation of 0 to size-1: int64 [size]."""
    return np.argsort(random_bits(key, size), kind="stable")
