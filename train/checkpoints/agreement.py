"""Work that several processes do together, with one outcome: a result for all of them, or an error on all.

A process that fails alone would leave the others waiting for it. So whatever may fail while a checkpoint is
written or read goes through here: every process of the group calls the same function at the same point, and
an exception of any of them is raised on each. A group of None, or of one process, communicates nothing.

All other collectives of this project are in parallel/groups.py. These here move Python objects, a few
kilobytes for each process and never a tensor, by the wrapper that DCP uses for the same purpose.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from parallel.groups import Group

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the slowest disk of the others."""


def background_group(group: Group | None) -> Group | None:
    """Return a group of the same processes that a thread may use while training uses all others.

    Collectives must be in one order on all processes of a group, and two threads have no order. Processes
    talk through the host (gloo), whatever training uses. All processes of the world call this together.
    """
    if group is None or group.size == 1:
        return None
    handle = distributed.new_group(list(group.ranks), backend="gloo", timeout=PATIENCE)
    return Group("checkpoint", group.ranks, rank=group.rank, handle=cast(ProcessGroup, handle))


def is_first(group: Group | None) -> bool:
    """Return whether this is the process that does what only one may do."""
    return group is None or group.rank == 0


def decide(group: Group | None, decision: Callable[[], T]) -> T:
    """Call `decision` on the first process alone and return its result, or raise its error, on all."""
    if group is None or group.size == 1:
        return decision()
    try:
        return _DistWrapper(group.handle, True, 0).broadcast("decide", decision)
    except CheckpointException as failure:
        raise_first(failure, group)


def combine(group: Group | None, part: Callable[[], T], merge: Callable[[list[T]], R]) -> R:
    """Return merge([part() of each process]) on all; `merge` is called on the first process alone."""
    if group is None or group.size == 1:
        return merge([part()])
    try:
        return _DistWrapper(group.handle, True, 0).all_reduce("combine", part, merge)
    except CheckpointException as failure:
        raise_first(failure, group)


def raise_first(failure: CheckpointException, group: Group | None) -> NoReturn:
    """Raise what went wrong on the first rank that failed; DCP's own exception is no Exception."""
    rank, (error, _) = min(failure.failures.items())
    if group is not None and group.size > 1:
        error.add_note(f"raised on rank {rank} of {group.size}")
        if isinstance(error, OSError):
            raise OSError(f"rank {rank}: {error}") from error
    raise error from failure
