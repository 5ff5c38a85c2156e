"""How few microbatches show what a whole step takes.

The largest memory is reached when a rank holds most microbatches at once, and from then on a schedule repeats
itself. So a step with the fewest microbatches in which every rank holds the same numbers at once has the same
peak, while FLOPs and bytes grow in proportion to the microbatches (launch/dryrun/rank.py scales them).
"""

from parallel.config import ParallelConfig
from parallel.pipeline.in_flight import held_at_once
from parallel.pipeline.rules import schedule_problems

WITHOUT_PIPELINE = 2
"""The second microbatch's forward pass meets what the first has left behind."""


def enough_microbatches(parallel: ParallelConfig, num_microbatches: int) -> int:
    """Return the fewest microbatches whose step has the peak of a step of `num_microbatches`."""
    if parallel.pp == 1:
        return min(num_microbatches, WITHOUT_PIPELINE)
    sizes = {"pp": parallel.pp, "chunks": parallel.chunks}
    whole = held_at_once(parallel.schedule, **sizes, num_microbatches=num_microbatches)
    for fewer in range(parallel.pp, num_microbatches):
        legal = not schedule_problems(parallel.schedule, **sizes, num_microbatches=fewer)
        if legal and held_at_once(parallel.schedule, **sizes, num_microbatches=fewer) == whole:
            return fewer
    return num_microbatches
