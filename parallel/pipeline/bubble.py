"""How long ranks stand idle: a schedule's table run on a clock, beside the closed formulas. No torch.

The clock knows the cost of a pass through one stage and that a pass waits for what it needs; transfers cost
nothing. The formulas of the literature assume many microbatches and equal stages; where one does not describe
a table, `idle_formula` gives None rather than a number that looks like an answer.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.config import Schedule
from parallel.pipeline.table import Action, ActionKind, ActionTable

_KEYS = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward",
    ActionKind.BACKWARD_WEIGHT: "weight",
}
_Key = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of a pass through one stage, in any unit; a full backward takes backward_input + backward_weight.

    overlapped: of a forward and a full backward that run together and hide each other's exchange; None where
    they follow each other.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    overlapped: float | None = None

    def of(self, action: Action) -> float:
        """Return the time that one action takes."""
        match action.kind:
            case ActionKind.FORWARD:
                return self.forward
            case ActionKind.BACKWARD:
                return self.backward_input + self.backward_weight
            case ActionKind.BACKWARD_INPUT:
                return self.backward_input
            case ActionKind.BACKWARD_WEIGHT:
                return self.backward_weight
            case ActionKind.OVERLAP if self.overlapped is not None:
                return self.overlapped
            case _:
                return sum(self.of(part) for part in action.parts)


@dataclass(frozen=True)
class Timing:
    """makespan: from the first pass to the end of the last; busy: of each rank."""

    makespan: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Return the time for which each rank is idle."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Return the idle fraction of all ranks' time."""
        return sum(self.idle) / (self.makespan * len(self.busy))


def simulate(table: ActionTable, costs: Costs) -> Timing:
    """Run a table on a clock. Raises ValueError where ranks wait for each other for ever."""
    queues = [deque(_units(actions, costs)) for actions in table.actions]
    clocks, busy, ends = [0.0] * len(queues), [0.0] * len(queues), dict[_Key, float]()
    while any(queues):
        progress = False
        for rank, queue in enumerate(queues):
            while queue and all(need in ends for need in _needs(queue[0], table.num_stages)):
                action = queue.popleft()
                starts = [ends[need] for need in _needs(action, table.num_stages)]
                cost = costs.of(action)
                clocks[rank] = max([clocks[rank], *starts]) + cost
                busy[rank] += cost
                ends.update({_key(part): clocks[rank] for part in action.passes})
                progress = True
        if not progress:
            heads = [f"rank {rank}: {queue[0]}" for rank, queue in enumerate(queues) if queue]
            raise ValueError(f"the table has a deadlock at {', '.join(heads)}")
    return Timing(max(clocks), tuple(busy))


def _units(actions: Iterable[Action], costs: Costs) -> list[Action]:
    """Return what takes time and starts as one: an OVERLAP only where its two passes really run together."""
    if costs.overlapped is None:
        return [part for action in actions for part in action.passes]
    return [action for action in actions if action.passes]


def _key(action: Action) -> _Key:
    return _KEYS[action.kind], action.stage, action.microbatch


def _needs(action: Action, num_stages: int) -> list[_Key]:
    """Return what must be over before an action starts."""
    needs: list[_Key] = []
    for part in action.passes:
        if part.kind is ActionKind.FORWARD:
            if part.stage > 0:
                needs.append(("forward", part.stage - 1, part.microbatch))
        elif part.kind is ActionKind.BACKWARD_WEIGHT:
            needs.append(("backward", part.stage, part.microbatch))
        else:
            needs.append(("forward", part.stage, part.microbatch))
            if part.stage < num_stages - 1:
                needs.append(("backward", part.stage + 1, part.microbatch))
    return needs


def idle_formula(schedule: Schedule, *, pp: int, num_microbatches: int, costs: Costs) -> float | None:
    """Return the idle time of a rank by the schedule's closed formula, None where none describes the table.

    F, I, W are the costs of one stage, B = I + W, and F&B is the cost of both when they overlap.

      GPipe, 1F1B      (pp - 1) (F + B)         any microbatches, any costs (arXiv 2104.04473, section 2.2)
      interleaved      (pp - 1) (F + B)         pp divides the microbatches, any costs (the same section)
      interleaved_zb   (pp - 1) (F + I - W)     the same, and W at most F and I (ZB1P of 2401.10241)
      zbv              (pp - 1) F               2 pp microbatches, F = I = W: idle at the start only, when
                                                rank r waits for the r ranks before it
      dualpipev        (pp - 1) (F&B + B - 3W)  the same; of the last rank, which idles longest
                                                (github.com/deepseek-ai/DualPipe, where PP is our 2 pp)
                       (pp - 1) F               the same where the passes do not run together: then it is ZBV
    """
    f, i, w, joined = costs.forward, costs.backward_input, costs.backward_weight, costs.overlapped
    equal, in_rounds = f == i == w, num_microbatches % pp == 0
    match str(schedule):
        case "gpipe" | "1f1b":
            time = f + i + w
        case "interleaved" if in_rounds:
            time = f + i + w
        case "interleaved_zb" if in_rounds and w <= min(f, i):
            time = f + i - w
        case "zbv" if equal and num_microbatches >= 2 * pp:
            time = f
        case "dualpipev" if equal and num_microbatches >= 2 * pp:
            time = f if joined is None else joined + i - 2 * w
        case _:
            return None
    return (pp - 1) * time


@dataclass(frozen=True, kw_only=True)
class BubbleRow:
    """What the clock and the formula say of one table. Times in the unit of the costs."""

    schedule: Schedule
    pp: int
    num_microbatches: int
    makespan: float
    bubble: float
    """Idle fraction of all ranks' time."""
    idle: float
    """Idle time of the rank that idles longest."""
    formula: float | None
    """The same by `idle_formula`."""


def bubble_row(table: ActionTable, schedule: Schedule, *, num_microbatches: int, costs: Costs) -> BubbleRow:
    """Run one schedule's table on the clock and put the formula beside it."""
    timing, pp = simulate(table, costs), len(table.actions)
    sizes = {"pp": pp, "num_microbatches": num_microbatches}
    return BubbleRow(
        schedule=schedule,
        **sizes,
        makespan=timing.makespan,
        bubble=timing.bubble,
        idle=max(timing.idle),
        formula=idle_formula(schedule, costs=costs, **sizes),
    )


def bubble_table(rows: Iterable[BubbleRow]) -> str:
    """Return the rows as text, one line each under a heading."""
    lines = [f"{'schedule':<15}{'pp':>4}{'microbatches':>14}{'bubble':>8}{'idle':>9}{'formula':>9}"]
    for row in rows:
        formula = "-" if row.formula is None else f"{row.formula:.2f}"
        lines.append(
            f"{row.schedule:<15}{row.pp:>4}{row.num_microbatches:>14}{row.bubble:>8.3f}{row.idle:>9.2f}{formula:>9}"
        )
    return "\n".join(lines)
