"""Fill-in-Middle, prefix-suffix-middle form (arXiv 2412.19437, section 4.1; method of arXiv 2207.14255).

A chosen document becomes `begin PREFIX hole SUFFIX end MIDDLE eos`: whole, before packing, with nothing
lost. Which documents and where they are cut is a function of (key, document); the cuts fall between
tokens, at two points drawn evenly from the document.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.hashing import hash_indices, uniform
from data.tokenizer import FimTokens

NUM_MARKS = 3  # tokens that the rearrangement adds
MIN_TOKENS = 3  # a shorter document cannot have three parts


def chosen(
    key: int, documents: NDArray[np.int64], lengths: NDArray[np.int64], *, rate: float
) -> NDArray[np.bool_]:
    """Return which documents are rearranged; lengths are without eos."""
    if rate == 0.0:
        return np.zeros(len(documents), np.bool_)
    return (uniform(key, documents) < rate) & (lengths >= MIN_TOKENS)


def cut_points(key: int, document: int, length: int) -> tuple[int, int]:
    """Return where the middle of a document begins and ends, 0 <= begin <= end <= length."""
    # two counters per document; the high 32 bits scaled to [0, length] keep all choices equally likely
    high = hash_indices(key ^ 0x46494D, np.array([2 * document, 2 * document + 1])) >> np.uint64(32)
    a, b = (int(h) * (length + 1) >> 32 for h in high)
    return min(a, b), max(a, b)


def rearranged(tokens: NDArray[Any], begin: int, end: int, marks: FimTokens) -> list[NDArray[Any]]:
    """Return the pieces of the rearranged document in order, without eos; slices are views."""
    return [
        np.array([marks.begin]),
        tokens[:begin],
        np.array([marks.hole]),
        tokens[end:],
        np.array([marks.end]),
        tokens[begin:end],
    ]
