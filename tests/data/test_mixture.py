import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import Mixture

WEIGHTS = st.lists(st.floats(0.001, 100), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 10**12), count=st.integers(0, 300))
def test_counts_are_exact_from_any_sample_on(weights: list[float], first: int, count: int) -> None:
    mixture = Mixture({f"s{i}": weight for i, weight in enumerate(weights)})
    counted = mixture.counts(first)
    sources = mixture.sources(first, count)
    assert [mixture.source(first + i) for i in range(min(count, 20))] == [
        mixture.names[source] for source in sources[:20]
    ]
    expected = counted + np.bincount(sources, minlength=len(weights))
    assert np.array_equal(mixture.counts(first + count), expected)
    assert counted.sum() == first


@settings(max_examples=20, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_is_close_to_the_weights(weights: list[float]) -> None:
    mixture = Mixture({f"s{i}": weight for i, weight in enumerate(weights)})
    share = np.array(weights) / sum(weights)
    for i in (10, 100, 1000, 10_000, 60_000):
        # rounding to the cycle adds at most one part in 65536 per source
        allowed = len(weights) / 2 + 1 + i * len(weights) / 65536
        assert np.abs(mixture.counts(i) - i * share).max() <= allowed


def test_simple_weights_have_a_short_cycle() -> None:
    mixture = Mixture({"a": 3.0, "b": 1.0})
    assert mixture.cycle == 4
    # due at 1/6, 3/6 and 5/6, and at 1/2: a tie, which goes to the source named first
    assert mixture.sources(0, 8).tolist() == [0, 0, 1, 0] * 2


def test_what_rounding_leaves_goes_to_the_largest_remainder() -> None:
    mixture = Mixture({"b": 1.0, "a": 2.0})
    assert mixture.counts(mixture.cycle).tolist() == [21845, 43691]


def test_a_tiny_weight_still_appears_and_zero_never() -> None:
    mixture = Mixture({"a": 1.0, "tiny": 1e-9, "never": 0.0})
    assert mixture.counts(mixture.cycle).tolist()[1:] == [1, 0]


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": 1.0, "b": -0.5}, {}])
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match="must not be negative, and one must be above 0"):
        Mixture(weights)
