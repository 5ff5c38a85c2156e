"""Counter-based randomness: a value is a function of (key, index), never of what was drawn before it.

The order of documents, their rearrangement and the splitting of tokens all come from here, so that
sample i can be computed alone and does not depend on the version of a library's random generator.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def make_key(*parts: int | str) -> int:
    """Return a 64-bit key that names a stream of random values, such as (seed, source, epoch, purpose)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def text_key(text: str) -> int:
    """Return a 64-bit key of a document's text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_indices(key: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one 64-bit value per index, evenly distributed; `indices` must be an array of integers >= 0."""
    x = indices.astype(np.uint64) * _INCREMENT
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= _MULTIPLIER_1
    x ^= x >> np.uint64(27)
    x *= _MULTIPLIER_2
    x ^= x >> np.uint64(31)
    return x


def uniform(key: int, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return one number in [0, 1) per index, with 53 random bits."""
    return (hash_indices(key, indices) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, length: int) -> NDArray[np.int64]:
    """Return a random order of range(length): the order that sorts the hashes of the indices."""
    return np.argsort(hash_indices(key, np.arange(length)), kind="stable").astype(np.int64, copy=False)
