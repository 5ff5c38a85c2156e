"""Which source sample i of a run comes from, and how many samples of each source came before it.

The weights become whole numbers of slots in a repeating cycle. Within the cycle the k-th of a source's n
slots is due at (k + 1/2)/n, and slots are served in the order they are due, so that after any number of
samples every source is within a few samples of its share. A cycle is a table; looking up sample i costs
the same at the beginning of a run and after a billion samples.
"""

from math import gcd

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

_MAX_CYCLE = 1 << 16  # weights are kept to 1 part in 65536, and every positive weight gets at least that


class Mixture:
    """The order of sources. `weights` are relative; a source of weight 0 never appears."""

    def __init__(self, weights: dict[str, float]) -> None:
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise DataError(f"source weights {weights} must not be negative, and one must be above 0")
        self.names = list(weights)
        slots_N = _slots(np.array([weights[name] for name in self.names], np.float64))
        self.cycle = int(slots_N.sum())
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in slots_N.tolist() if n])
        source = np.repeat(np.arange(len(slots_N)), slots_N)
        self._source_C = source[np.lexsort((source, due))]  # ties go to the source named first
        before = np.zeros((self.cycle + 1, len(slots_N)), np.int64)
        before[np.arange(1, self.cycle + 1), self._source_C] = 1
        self._before_C1N = np.cumsum(before, axis=0)

    def source(self, i: int) -> str:
        """Return the source of sample i."""
        return self.names[self._source_C[i % self.cycle]]

    def counts(self, i: int) -> NDArray[np.int64]:
        """Return how many of the samples before i each source gave, in the order of `names`."""
        cycles, rest = divmod(i, self.cycle)
        return cycles * self._before_C1N[-1] + self._before_C1N[rest]

    def sources(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the sources of samples [first, first + count), as indices into `names`."""
        return self._source_C[np.arange(first, first + count) % self.cycle]


def _slots(weights_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Share the cycle out by largest remainders, then shorten it if all shares have a common divisor."""
    ideal = weights_N / weights_N.sum() * _MAX_CYCLE
    slots = np.where(weights_N > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    missing = _MAX_CYCLE - int(slots.sum())
    if missing > 0:
        slots[np.argsort(slots - ideal, kind="stable")[:missing]] += 1
    return slots // gcd(*slots.tolist())
