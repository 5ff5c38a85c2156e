"""The legal values next to one that is refused, for remedies."""

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in order; none for zero, which everything divides."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(value: int, legal: Iterable[int]) -> str:
    """Return the legal values next to `value`, such as "2 or 4"; a legal `value` is its own neighbour."""
    choices = sorted(legal)
    below = [n for n in choices if n <= value][-1:]
    above = [n for n in choices if n >= value][:1]
    return " or ".join(str(n) for n in dict.fromkeys(below + above))


def nearest_multiple(value: int, unit: int) -> str:
    """Return the positive multiples of `unit` next to `value`."""
    return nearest(value, [n for n in (value // unit * unit, -(-value // unit) * unit) if n > 0])
