"""Action tables of all schedules, by torch's own generators: the one file that knows their private names.

torch.distributed.pipelining orders the passes and inserts transfers and reductions. Only the result is taken:
parallel/pipeline/executor.py runs it. GPipe and 1F1B are short enough to be written here (torch's executor of
1F1B does not use a table, and the table that it gives is wrong on the last rank).
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
from parallel.pipeline.rules import schedule_problems, stage_to_rank, stages_per_rank
from parallel.pipeline.table import Action, ActionKind, ActionTable

_FORWARD, _BACKWARD = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
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
        orders = [[part for action in order for part in _apart(action)] for order in orders]
    with_reductions = [_add_reduce_grad(order, num_microbatches) for order in orders]
    lowered = _add_send_recv(
        {rank: [a for a in order if a is not None] for rank, order in enumerate(with_reductions)},
        stage_to_rank=places.__getitem__,
        num_stages=len(places),
    )
    return ActionTable(tuple(tuple(map(_ours, lowered[rank])) for rank in range(pp)), places)


def _pass_orders(
    schedule: Schedule, pp: int, per_rank: int, num_microbatches: int
) -> list[list[_Action | None]]:
    """Return the passes of each rank in order; None where torch marks an idle slot."""
    if schedule in _TORCH_CLASSES:
        # torch writes DualPipeV for a pipeline that fills up; leaving microbatches out keeps an order legal
        enough = max(num_microbatches, 2 * pp) if schedule is Schedule.dualpipev else num_microbatches
        orders = get_schedule_ops(_TORCH_CLASSES[schedule], pp, enough, num_stages_per_rank=per_rank)
        return [_first_microbatches(order, num_microbatches) for order in orders]
    if schedule == Schedule.gpipe:
        return [_one_f_one_b(rank, num_microbatches, num_microbatches) for rank in range(pp)]
    return [_one_f_one_b(rank, pp - 1 - rank, num_microbatches) for rank in range(pp)]


def _first_microbatches(order: list[_Action | None], num_microbatches: int) -> list[_Action | None]:
    """Leave out the passes of microbatches that the step does not have; what was joined to one runs alone."""
    kept: list[_Action | None] = []
    for action in order:
        parts = [p for p in _apart(action) if p is None or _microbatch(p) < num_microbatches]
        kept += [action] if len(parts) == len(_apart(action)) else parts
    return kept


def _microbatch(action: _Action) -> int:
    return -1 if action.microbatch_index is None else action.microbatch_index


def _apart(action: _Action | None) -> tuple[_Action | None, ...]:
    return (action,) if action is None or action.sub_actions is None else action.sub_actions


def _one_f_one_b(stage: int, warmup: int, num_microbatches: int) -> list[_Action | None]:
    """Return `warmup` forwards, then a forward and a backward in turn, then the backwards that are left.

    With as many warm-up forwards as later stages this is 1F1B (arXiv 2006.09503), which holds no more
    microbatches than there are stages; with all forwards first it is GPipe (1811.06965).
    """
    warmup = min(warmup, num_microbatches)
    order: list[_Action | None] = [_Action(stage, _FORWARD, microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches):
        if warmup + microbatch < num_microbatches:
            order.append(_Action(stage, _FORWARD, warmup + microbatch))
        order.append(_Action(stage, _BACKWARD, microbatch))
    return order


def _ours(action: _Action) -> Action:
    parts = tuple(map(_ours, action.sub_actions or ()))
    return Action(ActionKind(action.computation_type.value), action.stage_index, _microbatch(action), parts)
