"""Remedies name the legal values on both sides of a refused one."""

from parallel.nearest import divisors, nearest, nearest_multiple


def test_divisors_are_in_order():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert divisors(0) == []


def test_neighbours_on_both_sides_or_on_the_only_one():
    assert nearest(3, [8, 4, 1, 2]) == "2 or 4"
    assert nearest(4, [1, 4, 8]) == "4"
    assert nearest(9, [1, 8]) == "8"
    assert nearest(0, [2, 3]) == "2"
    assert nearest(5, []) == ""


def test_multiples_are_positive():
    assert nearest_multiple(10, 4) == "8 or 12"
    assert nearest_multiple(3, 4) == "4"
    assert nearest_multiple(8, 4) == "8"
