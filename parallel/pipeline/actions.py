"""Action tables of all schedules, by torch's own generators: the one file that knows their private names.

torch.distributed.pipelining orders the passes and inserts transfers and reductions. Only the result is taken:
parallel/pipeline/executor.py runs it. The passes of GPipe and 1F1B are those of parallel/pipeline/orders.py:
torch's executor of 1F1B does not use a table, and the table that it gives is wrong on the last rank.
"""

from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_reduce_grad,
    _add_send_recv,
    _ComputationType,
)

from parallel.config import Schedule
from parallel.pipeline.orders import first_microbatches, pass_table
from parallel.pipeline.rules import schedule_problems, stage_to_rank, stages_per_rank
from parallel.pipeline.table import Action, ActionKind, ActionTable

_TORCH_CLASSES = {
    Schedule.interleaved: torch_schedules.ScheduleInterleaved1F1B,
    Schedule.interleaved_zb: torch_schedules.ScheduleInterleavedZeroBubble,
    Schedule.zbv: torch_schedules.ScheduleZBVZeroBubble,
    Schedule.dualpipev: torch_schedules.ScheduleDualPipeV,
}


def action_table(
    schedule: Schedule, *, pp: int, chunks: int, num_microbatches: int, overlap: bool = True
) -> ActionTable:
    """Return what each of `pp` ranks does in a step of `num_microbatches`.

    `chunks` is the number of stages per rank of the interleaved schedules. Without `overlap`, passes that
    DualPipeV would run together follow each other, and what the first gives is sent before the second starts.
    Raises ValueError where a rule of the schedule is broken.
    """
    problems = schedule_problems(schedule, pp=pp, chunks=chunks, num_microbatches=num_microbatches)
    if problems:
        raise ValueError("; ".join(problems))
    places = stage_to_rank(schedule, pp=pp, chunks=chunks)
    orders = _pass_orders(schedule, pp, stages_per_rank(schedule, chunks=chunks), num_microbatches)
    if not overlap:
        orders = [[part for action in order for part in action.passes] for order in orders]
    lowered = _add_send_recv(
        {rank: _with_reductions(order, num_microbatches) for rank, order in enumerate(orders)},
        stage_to_rank=places.__getitem__,
        num_stages=len(places),
    )
    return ActionTable(tuple(tuple(map(_ours, lowered[rank])) for rank in range(pp)), places)


def _pass_orders(schedule: Schedule, pp: int, per_rank: int, num_microbatches: int) -> list[list[Action]]:
    """Return the passes of each rank in order."""
    if schedule not in _TORCH_CLASSES:
        table = pass_table(schedule, pp=pp, chunks=per_rank, num_microbatches=num_microbatches)
        return [list(actions) for actions in table.actions]
    # torch writes DualPipeV for a pipeline that fills up; leaving microbatches out keeps an order legal
    enough = max(num_microbatches, 2 * pp) if schedule is Schedule.dualpipev else num_microbatches
    orders = get_schedule_ops(_TORCH_CLASSES[schedule], pp, enough, num_stages_per_rank=per_rank)
    busy = [[_ours(action) for action in order if action is not None] for order in orders]  # None: idle
    return [first_microbatches(order, num_microbatches) for order in busy]


def _with_reductions(order: list[Action], num_microbatches: int) -> list[_Action]:
    found = _add_reduce_grad([_theirs(action) for action in order], num_microbatches)
    return [action for action in found if action is not None]


def _ours(action: _Action) -> Action:
    parts = tuple(map(_ours, action.sub_actions or ()))
    microbatch = -1 if action.microbatch_index is None else action.microbatch_index
    return Action(ActionKind(action.computation_type.value), action.stage_index, microbatch, parts)


def _theirs(action: Action) -> _Action:
    microbatch = None if action.microbatch < 0 else action.microbatch
    parts = tuple(map(_theirs, action.parts)) or None
    return _Action(action.stage, _ComputationType(action.kind.value), microbatch, parts)
