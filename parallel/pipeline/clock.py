"""A schedule's table on a clock where stages differ: what each pass and each transfer takes.

A search runs one table thousands of times, with other costs each time. Which pass waits for which does not
depend on costs, so a table is put into an order in which everything needed comes first, once (`program_of`),
and each run (`run`) goes through that list. parallel/pipeline/bubble.py runs tables on it with one cost for
all stages, and compares them with the literature's formulas.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from parallel.config import Schedule
from parallel.pipeline.orders import pass_table
from parallel.pipeline.table import Action, ActionKind, ActionTable

Slot = tuple[ActionKind, int, int]
"""What has a cost of its own: (kind, stage, -1), or (OVERLAP, stage of the forward, of the backward)."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """A pass, or two that run together: who runs it, the index of its cost, and what it waits for.

    waits: pairs of an earlier unit and the border between stages that what it gives has to cross, -1 for
    none.
    """

    rank: int
    slot: int
    waits: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """A table in an order in which it can be run, and the costs that it asks for."""

    num_ranks: int
    slots: tuple[Slot, ...]
    units: tuple[_Unit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Times of one step, in the unit of the costs; busy and ends are of each rank."""

    busy: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Return the time from the first pass to the end of the last."""
        return max(self.ends)

    @property
    def idle(self) -> tuple[float, ...]:
        """Return the time for which each rank is idle."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Return the idle fraction of all ranks' time."""
        return sum(self.idle) / (self.makespan * len(self.busy)) if self.makespan else 0.0


@cache
def cached_program(
    schedule: Schedule, *, pp: int, chunks: int, num_microbatches: int, overlap: bool = True
) -> Program:
    """Return the program of a schedule's table; see `parallel.pipeline.orders.pass_table`."""
    sizes = {"pp": pp, "chunks": chunks, "num_microbatches": num_microbatches}
    return program_of(pass_table(schedule, **sizes, overlap=overlap))


def program_of(table: ActionTable) -> Program:
    """Put a table's passes in order. Raises ValueError where ranks wait for each other for ever."""
    queues = [deque(action for action in actions if action.passes) for actions in table.actions]
    slots: dict[Slot, int] = {}
    units: list[_Unit] = []
    done: dict[tuple[ActionKind, int, int], int] = {}
    while any(queues):
        before = len(units)
        for rank, queue in enumerate(queues):
            while queue and all(key in done for key, _ in _needs(queue[0], table.num_stages)):
                action = queue.popleft()
                waits = tuple((done[key], border) for key, border in _needs(action, table.num_stages))
                for part in action.passes:
                    done[_given(part), part.stage, part.microbatch] = len(units)
                units.append(_Unit(rank, slots.setdefault(slot_of(action), len(slots)), waits))
        if len(units) == before:
            heads = [f"rank {rank}: {queue[0]}" for rank, queue in enumerate(queues) if queue]
            raise ValueError(f"the table has a deadlock at {', '.join(heads)}")
    return Program(len(queues), tuple(slots), tuple(units))


def slot_of(action: Action) -> Slot:
    """Return what names the cost of an action."""
    if action.parts:
        forward, backward = action.parts
        return action.kind, forward.stage, backward.stage
    return action.kind, action.stage, -1


def run(program: Program, costs: Mapping[Slot, float], *, transfers: Sequence[float]) -> Run:
    """Run a program. costs: time of each slot; transfers: from stage i to stage i + 1, and back."""
    times = [costs[slot] for slot in program.slots]
    crossing = [*transfers, 0.0]  # the last one is index -1: nothing to cross
    clocks, busy = [0.0] * program.num_ranks, [0.0] * program.num_ranks
    ends: list[float] = []
    for unit in program.units:
        start = clocks[unit.rank]
        for other, border in unit.waits:
            ready = ends[other] + crossing[border]
            if ready > start:
                start = ready
        cost = times[unit.slot]
        clocks[unit.rank] = start + cost
        busy[unit.rank] += cost
        ends.append(start + cost)
    return Run(busy=tuple(busy), ends=tuple(clocks))


def _given(part: Action) -> ActionKind:
    """Return what a pass gives to others: activations, the gradient of its input, or nothing but itself."""
    return ActionKind.BACKWARD_INPUT if part.kind is ActionKind.BACKWARD else part.kind


def _needs(action: Action, num_stages: int) -> list[tuple[tuple[ActionKind, int, int], int]]:
    """Return what must be over before an action starts, each with the border that it crosses, or -1."""
    forward, backward = ActionKind.FORWARD, ActionKind.BACKWARD_INPUT
    needs: list[tuple[tuple[ActionKind, int, int], int]] = []
    for part in action.passes:
        stage, microbatch = part.stage, part.microbatch
        if part.kind is forward:
            if stage > 0:
                needs.append(((forward, stage - 1, microbatch), stage - 1))
        elif part.kind is ActionKind.BACKWARD_WEIGHT:
            needs.append(((backward, stage, microbatch), -1))
        else:
            needs.append(((forward, stage, microbatch), -1))
            if stage < num_stages - 1:
                needs.append(((backward, stage + 1, microbatch), stage))
    return needs
