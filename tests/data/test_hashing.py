import numpy as np

from data.hashing import hash_indices, make_key, permutation, uniform


def test_matches_the_published_generator() -> None:
    # SplitMix64 with state 1234567 gives these; its k-th output is the hash of index k
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash_indices(1234567, np.array([1, 2, 3])).tolist() == expected


def test_keys_tell_types_and_order_apart() -> None:
    assert len({make_key(1, 2), make_key(2, 1), make_key("1", 2), make_key(12), make_key("1", "2")}) == 5
    assert make_key(7, "web", 0, "order") == make_key(7, "web", 0, "order")


def test_uniform_is_uniform() -> None:
    values = uniform(make_key("u"), np.arange(200_000))
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert np.abs(counts / 10_000 - 1).max() < 0.04
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_permutation_holds_every_index_once_and_depends_on_the_key() -> None:
    first = permutation(make_key(0), 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert not np.array_equal(first, permutation(make_key(1), 1000))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
