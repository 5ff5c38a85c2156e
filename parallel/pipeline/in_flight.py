"""How many microbatches a rank keeps activations of, from the schedule's table.

A forward pass through a stage leaves activations behind until its backward pass is over; where that is split,
until the weight gradients are done, which still read the inputs of matrix products. A rank with two stages
holds more of one when it holds fewer of the other, so what matters is which numbers occur together.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from parallel.config import Schedule
from parallel.pipeline.orders import pass_table
from parallel.pipeline.table import Action, ActionKind

Held = tuple[int, ...]
"""Microbatches held of each stage of a rank, in order of the stages."""


@cache
def held_at_once(
    schedule: Schedule, *, pp: int, chunks: int, num_microbatches: int
) -> tuple[tuple[Held, ...], ...]:
    """Return for every rank the combinations of held microbatches that none exceeds in all stages."""
    table = pass_table(schedule, pp=pp, chunks=chunks, num_microbatches=num_microbatches)
    result = []
    for rank, actions in enumerate(table.actions):
        stages = [stage for stage, owner in enumerate(table.stage_to_rank) if owner == rank]
        result.append(_largest(_states(actions, stages)))
    return tuple(result)


def peak_bytes(held: tuple[Held, ...], per_microbatch: Sequence[float]) -> float:
    """Return the most bytes that a rank keeps; per_microbatch: of each of its stages, in order."""
    return max(sum(n * size for n, size in zip(counts, per_microbatch, strict=True)) for counts in held)


def _states(actions: tuple[Action, ...], stages: list[int]) -> set[Held]:
    """Return what is held after every forward pass, the moments at which it can be most."""
    held: Counter[int] = Counter()
    states: set[Held] = set()
    for action in actions:
        for part in action.passes:  # of a joined pair, the forward pass comes first and both are in memory
            if part.kind is ActionKind.FORWARD:
                held[part.stage] += 1
                states.add(tuple(held[stage] for stage in stages))
            elif part.kind is not ActionKind.BACKWARD_INPUT:
                held[part.stage] -= 1
    return states


def _largest(states: set[Held]) -> tuple[Held, ...]:
    """Return the states that no other state is at least equal to in every stage."""

    def exceeded(state: Held) -> bool:
        others = (other for other in states if other != state)
        return any(all(a <= b for a, b in zip(state, other, strict=True)) for other in others)

    return tuple(sorted(state for state in states if not exceeded(state)))
