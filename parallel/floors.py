"""What can be said of a layout before its table is run: a time it cannot beat. Imports no torch."""

from dataclasses import replace

from parallel.config import ParallelConfig, Schedule
from parallel.planner import Plan, Task, once


def floor_seconds(task: Task, parallel: ParallelConfig) -> float:
    """Return a time that no step of a layout is shorter than.

    It is the model's computation and what nothing hides, spread evenly over the pipeline, without any wait.
    """
    p = parallel
    known, alike = task.shared.one_microbatch, Plan(task, parallel).alike
    computed, waited, exchanged = once(known, alike, lambda: _one_microbatch(task, parallel))
    hidden = p.pp > 1 and p.schedule == Schedule.dualpipev
    of_model = max(computed + waited, exchanged) if hidden else computed + waited + exchanged
    dp = task.world_size // (p.pp * p.tp * p.cp)
    num_microbatches = -(-max(task.batch_sizes) // (dp * p.microbatch_size))
    return num_microbatches * of_model / p.pp


def _one_microbatch(task: Task, parallel: ParallelConfig) -> tuple[float, float, float]:
    """Return the seconds of one microbatch in the whole model: computation, collectives, exchanges."""
    undivided = replace(parallel, pp=1, layers_per_stage=[task.model.num_layers])
    (one,) = Plan(task, undivided).stages.times
    return (
        one.forward + one.backward_input + one.backward_weight,
        one.collective_forward + one.collective_backward,
        one.exchange_forward + one.exchange_backward,
    )
