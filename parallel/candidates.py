"""Every layout of a task that could run: degrees, schedule, dispatcher, recomputation, microbatch size.

`parallel.checks.layout_problems` says what is legal, and parallel/backend_rules.py of FP8. Asking the first
about every combination would take minutes, most of which its sentences take; so combinations that arithmetic
excludes are never built, and what is left is all legal, which tests/parallel/test_search.py holds. Imports no
torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from math import gcd

from model.config import Recompute
from parallel.backend_rules import backend_problems
from parallel.checks import split_over_tp
from parallel.config import Context, Dispatcher, Engine, ParallelConfig, Schedule
from parallel.nearest import divisors
from parallel.pipeline.rules import INTERLEAVED, num_stages, schedule_problems
from parallel.placement import is_legal
from parallel.planner import Task

CHUNKS = (2, 4)
"""Stages per rank that are tried with the interleaved schedules."""
MICROBATCH_SIZES = (1, 2, 4, 8)
MOST_CP = 32
SCHEDULES = tuple(schedule for schedule in Schedule if schedule != Schedule.gpipe)
"""Those that are tried: gpipe takes as long as 1f1b and holds more."""


def candidates(
    task: Task, *, base: ParallelConfig, fixed: frozenset[str] = frozenset()
) -> Iterator[ParallelConfig]:
    """Yield every legal layout, data parallelism filling up the devices. See `parallel.search.search`."""

    def options(name: str, values: list[int]) -> list[int]:
        return [getattr(base, name)] if name in fixed else values

    world = task.world_size
    node_size = base.node_size if "node_size" in fixed else task.cluster.node_size
    for pp, tp, cp in product(
        options("pp", divisors(world)),
        options("tp", [n for n in divisors(world) if n <= node_size]),
        options("cp", [n for n in divisors(world) if n <= MOST_CP]),
    ):
        if not _degrees_fit(task, base, pp=pp, tp=tp, cp=cp, node_size=node_size):
            continue
        dp = world // (pp * tp * cp)
        if "dp" in fixed and base.dp not in (None, dp):
            continue
        sizes = [n for n in options("microbatch_size", _microbatch_sizes(base)) if _whole(task, dp * n)]
        experts = gcd(task.model.moe.num_experts, dp * cp * tp)
        for ep, size in product(options("ep", divisors(experts)), sizes):
            if experts % ep:
                continue
            layout = replace(
                base, dp=None, pp=pp, tp=tp, cp=cp, ep=ep, microbatch_size=size, node_size=node_size
            )
            layout = layout if "layers_per_stage" in fixed else replace(layout, layers_per_stage=[])
            yield from _variants(task, layout, fixed, dp=dp)


def _variants(
    task: Task, layout: ParallelConfig, fixed: frozenset[str], *, dp: int
) -> Iterator[ParallelConfig]:
    """Yield a layout's degrees with every schedule, dispatcher, recomputation and context that fits them."""
    dispatchers = _dispatchers(layout, fixed)
    modes = [layout.recompute] if "recompute" in fixed else list(Recompute)
    contexts = _contexts(task, layout, fixed)
    counts = tuple(size // dp // layout.microbatch_size for size in task.batch_sizes)
    for schedule, chunks in _schedules(layout, fixed):
        stages = num_stages(schedule, pp=layout.pp, chunks=chunks) if layout.pp > 1 else 1
        runs = layout.pp == 1 or _schedule_runs(schedule, layout.pp, chunks, counts)
        if not _placed(task, layout, stages) or not runs:
            continue
        for dispatcher, recompute, context in product(dispatchers, modes, contexts):
            yield replace(
                layout,
                schedule=schedule,
                chunks=chunks,
                dispatcher=dispatcher,
                recompute=recompute,
                context=context,
            )


def _placed(task: Task, layout: ParallelConfig, stages: int) -> bool:
    """Return whether every stage gets layers, by hand where the user says how many."""
    num_layers = task.model.num_layers
    if by_hand := layout.layers_per_stage:
        return is_legal(by_hand, num_layers=num_layers, num_stages=stages)
    return num_layers >= stages - 2


def _degrees_fit(task: Task, base: ParallelConfig, *, pp: int, tp: int, cp: int, node_size: int) -> bool:
    if task.world_size % (pp * tp * cp):
        return False
    dp = task.world_size // (pp * tp * cp)
    pieces = 2 * cp * tp if cp > 1 else tp
    return (
        dp % base.dp_replicate == 0
        and gcd(*split_over_tp(task.model).values()) % tp == 0
        and (task.world_size <= node_size or node_size % tp == 0)
        and task.seq_len % pieces == 0
        and not (base.engine is Engine.deepspeed and base.zero_stage > 1 and pp > 1)
        and not backend_problems(task.precision, replace(base, tp=tp), task.model, path="parallel")
    )


def _whole(task: Task, unit: int) -> bool:
    return all(size % unit == 0 for size in task.batch_sizes)


def _microbatch_sizes(base: ParallelConfig) -> list[int]:
    return sorted({*MICROBATCH_SIZES, base.microbatch_size})


def _dispatchers(layout: ParallelConfig, fixed: frozenset[str]) -> list[Dispatcher]:
    """Return two hops as well where there are several nodes to reach, of equal size."""
    several = layout.ep > layout.node_size
    if "dispatcher" in fixed:
        broken = several and layout.dispatcher is Dispatcher.two_hop and layout.ep % layout.node_size
        return [] if broken else [layout.dispatcher]
    return list(Dispatcher) if several and layout.ep % layout.node_size == 0 else [Dispatcher.alltoall]


def _contexts(task: Task, layout: ParallelConfig, fixed: frozenset[str]) -> list[Context]:
    """Return how attention may see a split sequence; heads are exchanged only in equal numbers."""
    if layout.cp == 1:
        return [layout.context]
    ways = [layout.context] if "context" in fixed else list(Context)
    even = task.model.attention.num_heads // layout.tp % layout.cp == 0
    return [way for way in ways if way is Context.gather or even]


def _schedules(layout: ParallelConfig, fixed: frozenset[str]) -> list[tuple[Schedule, int]]:
    if layout.pp == 1:
        return [(layout.schedule, layout.chunks)]
    schedules = [layout.schedule] if "schedule" in fixed else list(SCHEDULES)
    chunks = [layout.chunks] if "chunks" in fixed else sorted({*CHUNKS, layout.chunks})
    return [
        (schedule, count)
        for schedule in schedules
        for count in (chunks if schedule in INTERLEAVED else [layout.chunks])
        if schedule not in INTERLEAVED or count > 1
    ]


@cache
def _schedule_runs(schedule: Schedule, pp: int, chunks: int, counts: tuple[int, ...]) -> bool:
    """Return whether a schedule takes every one of these numbers of microbatches."""
    sizes = {"pp": pp, "chunks": chunks}
    return not any(schedule_problems(schedule, num_microbatches=count, **sizes) for count in counts)
