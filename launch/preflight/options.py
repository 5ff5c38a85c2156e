"""Numbers on a command line that have a least value."""

import argparse
from collections.abc import Callable


def at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a type for argparse: numbers of a kind, int or float, from `least` on."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:g}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message on what is no number
    return parse
