"""The best layouts of a task: all legal ones, without those that do not fit, by predicted time. No torch.

Branch and bound. Each candidate has a floor, a time that its step cannot be shorter than: its computation and
what nothing hides, spread evenly over the pipeline, without any wait. Candidates are timed on their tables in
order of their floors, until the next floor lies above the slowest of the layouts that are kept. Of layouts
that differ only in what a user would try last (recomputation, microbatch size, dispatcher) the best is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from model.config import Recompute
from parallel.candidates import candidates
from parallel.config import ParallelConfig
from parallel.floors import floor_seconds
from parallel.planner import Plan, Task

_Family = tuple[object, ...]
"""What layouts of one family have in common."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The layouts that a search keeps, best first, and what it looked at."""

    plans: list[Plan]
    num_legal: int
    num_timed: int
    smallest: Plan | None
    """Where nothing fits: the layout that needs least memory."""


def search(
    task: Task, *, base: ParallelConfig, fixed: frozenset[str] = frozenset(), count: int = 10
) -> Found:
    """Return the best layouts of a task.

    Args:
        task: what is trained on what.
        base: the layout whose other settings (engine, replicas of the state) all candidates share.
        fixed: fields of `base` that candidates share as well.
        count: layouts to keep.
    """
    legal = list(candidates(task, base=base, fixed=fixed))
    ordered = sorted((floor_seconds(task, parallel), number) for number, parallel in enumerate(legal))
    kept: dict[_Family, tuple[float, int, Plan]] = {}
    timed = 0
    for floor, number in ordered:
        if floor > _slowest(kept.values(), count):
            break
        plan = Plan(task, legal[number])
        if not plan.fits:
            continue
        timed += 1
        seconds = plan.step(max(task.batch_sizes), rough=True).seconds
        family = _family(plan.parallel)
        if family not in kept or seconds < kept[family][0]:
            kept[family] = (seconds, number, plan)
    best = [plan for _, _, plan in nsmallest(count, kept.values(), key=lambda entry: entry[:2])]
    return Found(
        plans=sorted(best, key=lambda plan: plan.full_step.seconds),
        num_legal=len(legal),
        num_timed=timed,
        smallest=None if best else _smallest(task, legal),
    )


def _slowest(kept: Iterable[tuple[float, int, Plan]], count: int) -> float:
    """Return the time that a layout must beat to be among the `count` best."""
    times = nsmallest(count, (seconds for seconds, _, _ in kept))
    return times[-1] if len(times) == count else inf


def _family(parallel: ParallelConfig) -> _Family:
    pipeline = (parallel.schedule, parallel.chunks) if parallel.pp > 1 else None
    return parallel.pp, parallel.tp, parallel.cp, parallel.ep, pipeline


def _smallest(task: Task, legal: list[ParallelConfig]) -> Plan | None:
    """Return the layout whose fullest device holds least, among those of small state that recompute most."""
    sparing = [p for p in legal if p.recompute is Recompute.full] or legal
    least = min((p.microbatch_size for p in sparing), default=1)
    plans = [Plan(task, p) for p in sparing if p.microbatch_size == least]
    return min(plans, key=lambda plan: plan.peak_memory, default=None)
