"""Time one collective, and compare what arrived with what had to arrive."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from parallel.diagnosis import first_line
from parallel.groups import Group
from parallel.preflight.operations import ELEMENT_BYTES, OPERATIONS, whole_buffer, wrong_parts
from parallel.preflight.timing import REPEATS, WARM_UPS, timed
from parallel.preflight.uses import Use


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One collective as one rank saw it.

    turn: its number in the plan, the same for all groups that ran it side by side; group: name of the axis;
    ranks: global ranks of this group of it; num_bytes: of the whole buffer; seconds: median; wrong: elements
    that had a wrong value, in the worst of all runs; senders: global ranks they came from, where the
    operation tells; error: what the backend said if it failed, "" otherwise.
    """

    turn: int = 0
    group: str
    operation: str
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float = 0.0
    wrong: int = 0
    senders: tuple[int, ...] = ()
    error: str = ""

    @property
    def algbw(self) -> float:
        """Return bytes of the buffer a second; 0 where the collective failed."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def busbw(self) -> float:
        """Return bytes a second that each rank sends with the best algorithm."""
        return self.algbw * OPERATIONS[self.operation].share(len(self.ranks))


def exercise_all(
    planned: Iterable[Use], *, world: Group, device: torch.device, num_bytes: int
) -> Iterator[Exercise]:
    """Run every planned use in turn, and yield those of this process; all processes call this together.

    Groups of one axis run at the same time, as they do in training. Groups of one process have nothing to
    send; the same operation among the same processes is run once, whatever the axes are called.
    """
    done: set[tuple[str, tuple[int, ...]]] = set()
    for turn, (operation, group) in enumerate(planned):
        world.barrier()
        if group is None or group.size == 1 or (operation, group.ranks) in done:
            continue
        done.add((operation, group.ranks))
        yield exercise(operation, group, device=device, num_bytes=num_bytes, turn=turn)


def exercise(
    operation: str, group: Group, *, device: torch.device, num_bytes: int, turn: int = 0
) -> Exercise:
    """Run an operation of OPERATIONS on the group, whose processes call this together.

    Every run is compared with the expected values, the warm-up too: a link that errs does so now and then.
    """
    kind, count = OPERATIONS[operation], whole_buffer(group, num_bytes)
    seconds: list[float] = []
    worst, senders = 0, set[int]()
    error = ""
    try:
        expected = kind.expected(group, count, device)
        work = kind.prepare(group, count, device)
        for _ in range(WARM_UPS + REPEATS):
            took, result = timed(work, device)
            seconds.append(took)
            wrong, found = wrong_parts(kind, result, expected, group)
            worst, senders = max(worst, wrong), senders | set(found)
    except RuntimeError as failure:  # of the backend or of memory; of a lost process the next barrier tells
        error = first_line(failure)
    return Exercise(
        turn=turn,
        group=group.name,
        operation=operation,
        ranks=group.ranks,
        num_bytes=count * ELEMENT_BYTES,
        seconds=0.0 if error else statistics.median(seconds[WARM_UPS:]),
        wrong=worst,
        senders=tuple(sorted(senders)),
        error=error,
    )
