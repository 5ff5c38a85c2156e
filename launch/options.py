"""What the command lines of `python -m launch` share: overrides, options that several have, least values."""

import argparse
from collections.abc import Callable
from math import inf


def command_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m launch COMMAND` that takes the overrides of `python -m train`.

    about: the text of --help, line for line. Options are up to the caller; they may stand between overrides
    where the caller parses with `parse_intermixed_args`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m launch {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for python -m train: recipe=NAME …"
    )
    return parser


def add_measurement_options(parser: argparse.ArgumentParser, *, timeout_s: int) -> None:
    """Add what commands have whose processes meet, measure, and let the leader print: --json, --timeout-s.

    timeout_s: its default, in seconds.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--timeout-s",
        type=at_least(1, int),
        default=timeout_s,
        help=f"how long one rank may keep others waiting ({timeout_s})",
    )


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add what plans and dry runs have, which predict a job: --world-size, --imbalance, --json."""
    add = parser.add_argument
    add("--world-size", type=at_least(1, int), metavar="N", help="devices; default: cluster.num_devices")
    add(
        "--imbalance",
        type=at_least(1, float),
        default=1.0,
        metavar="X",
        help="rows of the busiest device over the mean (1)",
    )
    add("--json", action="store_true", help="print the whole answer as JSON")


def at_least(least: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a type for argparse: finite numbers of a kind, int or float, from `least` on."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < inf:  # nor nan
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:g}, and finite")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message on what is no number
    return parse
