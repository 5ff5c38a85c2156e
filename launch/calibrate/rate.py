"""A speed as it was measured: work of one run, and how long each run took."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one kind of work reaches.

    name: the field of `Efficiencies` that it gives, or gemm_fp32; what: the sizes, for people; unit: FLOP or
    B; work: FLOPs or bytes of one run; seconds: of each run.
    """

    name: str
    what: str
    unit: str
    work: float
    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """Return FLOPs or bytes a second in the median run."""
        return self.work / statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Return FLOPs or bytes a second in the fastest run."""
        return self.work / min(self.seconds)


def merged(of_ranks: Sequence[Sequence[Rate]]) -> dict[str, Rate]:
    """Return the rates of all ranks by name, each with the runs of every rank that measured it."""
    found: dict[str, Rate] = {}
    for rate in (rate for rates in of_ranks for rate in rates):
        known = found.get(rate.name)
        found[rate.name] = replace(rate, seconds=[*(known.seconds if known else ()), *rate.seconds])
    return found
