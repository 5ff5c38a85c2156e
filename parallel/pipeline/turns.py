"""Computations that take turns: one gives up its turn whenever it has started an exchange.

While the exchange is under way the other computes, and the wait comes after the other's turn. Everything runs
in one thread and in an order that depends on the computations alone, so all processes that exchange with each
other start the same exchanges in the same order.
"""

from collections.abc import Generator
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

Turns = Generator[None, None, A]
"""A computation that yields at the end of each turn and returns an A."""


def finish(turns: Turns[A]) -> A:
    """Run a computation to its end, turn after turn, and return its result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def alternate(first: Turns[A], second: Turns[B]) -> tuple[A, B]:
    """Run two computations turn by turn; what the longer one has left runs alone. Return both results."""
    while True:
        try:
            next(first)
        except StopIteration as end:
            return end.value, finish(second)
        try:
            next(second)
        except StopIteration as end:
            return finish(first), end.value
