"""How long ranks stand idle: a schedule's table run on a clock, beside the closed formulas. No torch.

Here all stages cost the same, and transfers nothing; parallel/pipeline/clock.py takes other costs as well.
The formulas of the literature assume many microbatches and equal stages; where one does not describe a table,
`idle_formula` gives None rather than a number that looks like an answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.config import Schedule
from parallel.pipeline.clock import Run, program_of, run
from parallel.pipeline.table import ActionKind, ActionTable


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

    def of(self, kind: ActionKind) -> float:
        """Return the time that a pass takes, or a pair of them that runs together."""
        backward = self.backward_input + self.backward_weight
        match kind:
            case ActionKind.FORWARD:
                return self.forward
            case ActionKind.BACKWARD:
                return backward
            case ActionKind.BACKWARD_INPUT:
                return self.backward_input
            case ActionKind.BACKWARD_WEIGHT:
                return self.backward_weight
            case _:
                return self.forward + backward if self.overlapped is None else self.overlapped


def simulate(table: ActionTable, costs: Costs) -> Run:
    """Run a table on a clock. Raises ValueError where ranks wait for each other for ever."""
    if costs.overlapped is None:  # what is joined starts as one only where it really runs together
        apart = tuple(tuple(table.passes(rank)) for rank in range(len(table.actions)))
        table = ActionTable(apart, table.stage_to_rank)
    program = program_of(table)
    seconds = {slot: costs.of(slot[0]) for slot in program.slots}
    return run(program, seconds, transfers=[0.0] * (table.num_stages - 1))


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
