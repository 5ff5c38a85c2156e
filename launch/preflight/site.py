"""What every check is given, and what every check answers.

All ranks run every check together and gather what each of them found, so that all come to the same outcome;
the leader alone prints it. A check never raises for what it finds: it lists it, and the next check runs.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from parallel.preflight.gather import gather_json
from train.config import RunConfig
from train.team import Team

SHOWN_HOSTS = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answer of one check: what was seen, and everything that is wrong with its remedy.

    broken: an accelerator has failed and would keep its peers waiting, so later checks stay on the CPU.
    """

    check: str
    detail: str
    problems: tuple[str, ...] = ()
    skipped: bool = False
    broken: bool = False

    @property
    def status(self) -> str:
        """Return one word: failed, skipped or ok."""
        return "failed" if self.problems else "skipped" if self.skipped else "ok"


class Roster:
    """Which rank is on which host, and how people read that. hosts: by rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)

    def name(self, ranks: Iterable[int]) -> str:
        """Return such as "ranks 8-15 (n1), rank 16 (n2)"."""
        by_host: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            by_host.setdefault(self.hosts[rank], []).append(rank)
        named = [f"rank{'s'[: len(here) > 1]} {spans(here)} ({host})" for host, here in by_host.items()]
        more = [f"and {len(named) - SHOWN_HOSTS} more hosts"] if len(named) > SHOWN_HOSTS else []
        return ", ".join(named[:SHOWN_HOSTS] + more)

    def exclusion(self, ranks: Iterable[int]) -> str:
        """Return how to go on without the hosts of `ranks`, or what to look at where there is no other."""
        bad = list(dict.fromkeys(self.hosts[rank] for rank in sorted(ranks)))
        if set(bad) == set(self.hosts):
            return f"look at what else runs on {', '.join(bad[:SHOWN_HOSTS])}"
        return f"exclude {', '.join(bad)} (sbatch --exclude={','.join(bad)})"

    def first_ranks(self) -> list[int]:
        """Return the first rank of every host."""
        return sorted({host: rank for rank, host in reversed(list(enumerate(self.hosts)))}.values())


@dataclass(frozen=True, kw_only=True)
class Site:
    """The job that is examined, on this process.

    agreed: all ranks have the same configuration; device_error: why this rank's device cannot be used, ""
    where it can; slow_percent: by how much a rank or group may be slower than the median; max_skew_s: how far
    clocks may be apart; num_bytes: of the buffers of collectives; clock: seconds since 1970 by this host.
    """

    team: Team
    config: RunConfig
    roster: Roster
    agreed: bool
    device_error: str
    slow_percent: float
    max_skew_s: float
    num_bytes: int
    clock: Callable[[], float] = time.time

    def share(self, value: Any) -> list[Any]:
        """Return the `value` of every rank."""
        return gather_json(value, self.team.world)


def spans(ranks: Sequence[int]) -> str:
    """Return increasing numbers in short: [0, 1, 2, 5] is "0-2, 5"."""
    runs = groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def deviants(values: Sequence[Any]) -> tuple[Any, dict[Any, list[int]]]:
    """Return the value that most ranks have (of the lowest rank on a tie), and the ranks of every other."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    usual = max(ranks, key=lambda value: len(ranks[value]))
    return usual, {value: those for value, those in ranks.items() if value != usual}
