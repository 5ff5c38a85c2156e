"""The order in which the samples of one source are drawn.

Neighbouring samples of a packed stream often come from one long document, and a batch of them would be one
text many times over. So samples are mixed within windows: a window is a run of consecutive samples, drawn in
an order that is a function of (seed, source, window) alone. Finding sample i stays O(1) for a window in use.
"""

import numpy as np
from numpy.typing import NDArray

from data.hashing import make_key, permutation


class SampleOrder:
    """Mixes samples within windows of `window` samples; with a window of 1 the order is the stream's."""

    def __init__(self, *, seed: int, source: str, window: int) -> None:
        self._seed = seed
        self._source = source
        self._window = window
        self._kept: tuple[int, NDArray[np.int64]] | None = None  # the window in use and its order

    def places(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the sample numbers in the stream of the draws [first, first + count), int64 [count]."""
        draws_N = np.arange(first, first + count)
        windows_N, inside_N = draws_N // self._window, draws_N % self._window
        places_N = np.empty(count, np.int64)
        for number in np.unique(windows_N).tolist():
            chosen_N = windows_N == number
            places_N[chosen_N] = number * self._window + self._order(number)[inside_N[chosen_N]]
        return places_N

    def used(self, count: int) -> int:
        """Return the samples of the stream that `count` draws use up: whole windows, so none comes twice."""
        return -(-count // self._window) * self._window

    def _order(self, number: int) -> NDArray[np.int64]:
        if self._kept is None or self._kept[0] != number:
            key = make_key(self._seed, self._source, number, "samples")
            self._kept = (number, permutation(key, self._window))
        return self._kept[1]
