"""How many microbatches a rank keeps activations of, from the schedule's table.

A forward pass through a stage leaves activations behind until its backward pass is over. Where that is split,
the gradient of the input is there first, and until those of the weights are done, inputs and output gradients
of the matrix products wait (model/put_off.py), which may be more than the activations or less. A rank with
two stages holds more of one when it holds fewer of the other, so what matters is which numbers occur
together.

While gradients of inputs are computed, layer after layer goes from activations to factors. So memory moves
from what is held before the pass to what is held after it, and is most at one of both. The layer at work has
some of either on top: in a dry run of DeepSeek-V3 0.1 GB of 70, with one small layer a stage up to 7 %.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from parallel.config import Schedule
from parallel.pipeline.orders import pass_table
from parallel.pipeline.table import Action, ActionKind

Held = tuple[tuple[int, int], ...]
"""Of each stage of a rank, in order: microbatches that wait for a backward pass, and those for which only the
gradients of weights are put off."""


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


def peak_bytes(held: tuple[Held, ...], whole: Sequence[float], put_off: Sequence[float]) -> float:
    """Return the most bytes that a rank keeps.

    Args:
        held: the combinations of held microbatches.
        whole: bytes of a microbatch that waits for a backward pass, of each of the rank's stages, in order.
        put_off: bytes of one for which only the gradients of weights are put off.
    """
    return max(
        sum(
            waiting * size + late * factors
            for (waiting, late), size, factors in zip(stages, whole, put_off, strict=True)
        )
        for stages in held
    )


def _states(actions: tuple[Action, ...], stages: list[int]) -> set[Held]:
    """Return what is held after every pass that leaves something, the moments at which it can be most."""
    whole: Counter[int] = Counter()
    put_off: Counter[int] = Counter()
    states: set[Held] = set()
    for action in actions:
        for part in action.passes:  # of a joined pair, the forward pass comes first and both are in memory
            match part.kind:
                case ActionKind.FORWARD:
                    whole[part.stage] += 1
                case ActionKind.BACKWARD:
                    whole[part.stage] -= 1
                case ActionKind.BACKWARD_INPUT:
                    whole[part.stage] -= 1
                    put_off[part.stage] += 1
                case _:
                    put_off[part.stage] -= 1
            if part.kind in (ActionKind.FORWARD, ActionKind.BACKWARD_INPUT):
                states.add(tuple((whole[stage], put_off[stage]) for stage in stages))
    return states


def _largest(states: set[Held]) -> tuple[Held, ...]:
    """Return the states that no other state is at least equal to in every stage."""

    def exceeded(state: Held) -> bool:
        others = (other for other in states if other != state)
        return any(
            all(a <= c and b <= d for (a, b), (c, d) in zip(state, other, strict=True)) for other in others
        )

    return tuple(sorted(state for state in states if not exceeded(state)))
