"""The passes of every schedule in order, without torch: what plans count and time.

parallel/pipeline/actions.py has the tables that run, transfers and reductions included; these are their
passes alone, the same in number and order, which tests/parallel/pipeline/test_orders.py holds. A schedule is
written as what one rank does, phase by phase; each pass of a kind through a stage takes the next microbatch.

    gpipe            all forwards, then all backwards (arXiv 1811.06965)
    1f1b             a forward for each later stage, then a backward in turn (2006.09503)
    interleaved      the same over several stages of a rank, in rounds (2104.04473, section 2.2)
    interleaved_zb   weight gradients put off by as many passes as the rank's number (ZB1P of 2401.10241)
    zbv, dualpipev   down the ranks and up again; below
"""

from collections import Counter, deque
from functools import cache

from parallel.config import Schedule
from parallel.pipeline.rules import V_SCHEDULES, schedule_problems, stage_to_rank
from parallel.pipeline.table import Action, ActionKind, ActionTable

F, B = ActionKind.FORWARD, ActionKind.BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741  # their names in the literature


@cache
def pass_table(
    schedule: Schedule, *, pp: int, chunks: int, num_microbatches: int, overlap: bool = True
) -> ActionTable:
    """Return the passes of each of `pp` ranks in a step of `num_microbatches`.

    `chunks` is the number of stages per rank of the interleaved schedules. Without `overlap`, passes that
    DualPipeV would run together follow each other. Raises ValueError where a rule of the schedule is broken.
    """
    sizes = {"pp": pp, "chunks": chunks, "num_microbatches": num_microbatches}
    if problems := schedule_problems(schedule, **sizes):
        raise ValueError("; ".join(problems))
    places = stage_to_rank(schedule, pp=pp, chunks=chunks)
    orders = [_order(schedule, rank, **sizes) for rank in range(pp)]
    if schedule in V_SCHEDULES:  # written for a pipeline that fills up, so for enough microbatches
        orders = [first_microbatches(order, num_microbatches) for order in orders]
    if not overlap:
        orders = [[part for action in order for part in action.passes] for order in orders]
    return ActionTable(tuple(map(tuple, orders)), places)


def _order(schedule: Schedule, rank: int, *, pp: int, chunks: int, num_microbatches: int) -> list[Action]:
    match str(schedule):
        case "gpipe":
            return _one_stage(rank, num_microbatches, warmup=num_microbatches)
        case "1f1b":
            return _one_stage(rank, num_microbatches, warmup=pp - 1 - rank)
        case "zbv":
            return _zbv(rank, pp, max(num_microbatches, 2 * pp - 1))
        case "dualpipev":
            return _dualpipev(rank, pp, max(num_microbatches, 2 * pp))
        case _:
            put_off = rank if schedule == Schedule.interleaved_zb else None
            return _interleaved(rank, pp, chunks, num_microbatches, put_off=put_off)


def _one_stage(stage: int, num_microbatches: int, *, warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    forwards = [Action(F, stage, i) for i in range(num_microbatches)]
    backwards = [Action(B, stage, i) for i in range(num_microbatches)]
    return _in_turn(forwards, [[one] for one in backwards], warmup=min(warmup, num_microbatches))


def _in_turn(forwards: list[Action], backwards: list[list[Action]], *, warmup: int) -> list[Action]:
    order = forwards[:warmup]
    for i, backward in enumerate(backwards):
        order += forwards[warmup + i : warmup + i + 1] + backward
    return order


def _interleaved(
    rank: int, pp: int, chunks: int, num_microbatches: int, *, put_off: int | None
) -> list[Action]:
    """A round takes as many microbatches as there are ranks through a rank's first stage, then its second, …

    put_off: by how many backward passes weight gradients are put off; None where they are not split off.
    """
    per_round = num_microbatches // max(1, num_microbatches // pp)
    total = chunks * num_microbatches

    def pass_number(i: int, kind: ActionKind) -> Action:
        rounds, within = divmod(i, chunks * per_round)
        chunk, place = divmod(within, per_round)
        chunk = chunk if kind is F else chunks - 1 - chunk
        return Action(kind, chunk * pp + rank, rounds * per_round + place)

    forwards = [pass_number(i, F) for i in range(total)]
    hops = pp - 1 - rank
    if put_off is None:
        warmup = (chunks - 1) * per_round + 2 * hops
        return _in_turn(forwards, [[pass_number(i, B)] for i in range(total)], warmup=min(warmup, total))
    weights = [pass_number(i, W) for i in range(total)]
    due = [[] for _ in range(put_off)] + [[weight] for weight in weights]
    backwards = [[pass_number(i, I), *due[i]] for i in range(total)]
    warmup = min((chunks - 1) * per_round + hops, total)
    return _in_turn(forwards, backwards, warmup=warmup) + weights[max(0, total - put_off) :]


class _Writer:
    """Writes a V schedule: `down` is the rank's stage on the way down, `up` the one on the way up."""

    def __init__(self, rank: int, pp: int) -> None:
        self.down, self.up = rank, 2 * pp - 1 - rank
        self.order: list[Action] = []
        self.count: Counter[tuple[ActionKind, int]] = Counter()
        self._owed: deque[Action] = deque()

    def do(self, kind: ActionKind, stage: int) -> None:
        """Append a pass of the next microbatch."""
        self.order.append(self._next(kind, stage))

    def together(self, forward: int, backward: int) -> None:
        """Append a forward pass through one stage that runs together with a backward pass through another."""
        parts = (self._next(F, forward), self._next(B, backward))
        self.order.append(Action(ActionKind.OVERLAP, -1, parts=parts))

    def owed(self) -> None:
        """Append the oldest weight gradient that is due, if one is."""
        if self._owed:
            self.order.append(self._owed.popleft())

    def _next(self, kind: ActionKind, stage: int) -> Action:
        counted = I if kind is B else kind  # a whole backward pass is one of the input as well
        action = Action(kind, stage, self.count[counted, stage])
        self.count[counted, stage] += 1
        if kind is I:
            self._owed.append(Action(W, stage, action.microbatch))
        return action


def _zbv(rank: int, pp: int, num_microbatches: int) -> list[Action]:
    """ZBV (arXiv 2401.10241, section 6): input and weight gradients apart; weights fill the gaps."""
    w = _Writer(rank, pp)
    for _ in range(2 * (pp - rank) - 1):
        w.do(F, w.down)
    for _ in range(rank):
        w.do(F, w.up)
        w.do(F, w.down)
    for _ in range(pp - rank):
        for kind in (F, I, W):
            w.do(kind, w.up)
    while w.count[F, w.up] < num_microbatches:
        kinds = (F, I, W) if w.count[F, w.down] < num_microbatches else (I, W)
        for kind in kinds:
            w.do(kind, w.down)
        for kind in (F, I, W):
            w.do(kind, w.up)
    for _ in range(rank):
        w.do(I, w.down)
        w.do(I, w.up)
    for _ in range(pp - rank):
        w.do(I, w.down)
        w.do(W, w.down)
    for stage in (w.up, w.down):
        while w.count[W, stage] < num_microbatches:
            w.do(W, stage)
    return w.order


def _dualpipev(rank: int, pp: int, num_microbatches: int) -> list[Action]:
    """DualPipeV: DualPipe (arXiv 2412.19437, section 3.2.1) folded in the middle, in eight steps."""
    w, later = _Writer(rank, pp), pp - 1 - rank
    for _ in range(2 * later):
        w.do(F, w.down)
    for _ in range(rank + 1):
        w.do(F, w.down)
        w.do(F, w.up)
    for _ in range(later):
        w.do(I, w.up)
        w.owed()
        w.do(F, w.up)
    for i in range(num_microbatches - 2 * pp + rank + 1):
        if i == 0 and later == 0:  # apart: the turn of the V would only wait for the joined pair
            w.do(F, w.down)
            w.do(B, w.up)
        else:
            w.together(w.down, w.up)
        w.together(w.up, w.down)
    for _ in range(later):
        w.do(B, w.up)
        w.together(w.up, w.down)
    for i in range(2 * (rank + 1)):  # from the middle on, input gradients first: earlier ranks wait for them
        w.do(B if i <= rank else I, w.down if i % 2 else w.up)
    for _ in range(later):
        w.owed()
        w.do(I, w.down)
    for _ in range(rank + 1):
        w.owed()
    return w.order


def first_microbatches(order: list[Action], num_microbatches: int) -> list[Action]:
    """Leave out the passes of microbatches that the step does not have; what was joined to one runs alone."""
    kept = []
    for action in order:
        passes = tuple(part for part in action.passes if part.microbatch < num_microbatches)
        kept += [action] if passes == action.passes else passes
    return kept
