"""Parts of batches: together they are the batch, whatever the sizes and the number of parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.loader import Batches


class Counting:
    """Sample i is [i, 10 i]."""

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        samples = np.arange(first, first + count, dtype=np.int64)
        return np.stack([samples, 10 * samples], 1)


@given(
    parts=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    first=st.integers(0, 9),
)
def test_the_parts_of_a_batch_are_the_batch(parts: int, sizes: list[int], first: int) -> None:
    source = Counting()
    loaders = [Batches(source, first, part=part, parts=parts) for part in range(parts)]
    expected = first
    for size in sizes:
        count = size * parts
        batch = np.concatenate([loader.next(count) for loader in loaders])
        assert np.array_equal(batch, source.batch(expected, count))
        expected += count
        assert {loader.next_sample for loader in loaders} == {expected}
    for loader in loaders:
        loader.close()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with Batches(Counting(), part=0, parts=2) as loader, pytest.raises(ValueError, match="5 samples"):
        loader.next(5)
