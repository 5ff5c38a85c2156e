"""One process in the place of any rank of a big job, alone: collectives that move nothing.

torch's "fake" backend answers every collective at once and leaves what it was to fill as it is. The groups of
a layout, of any number of processes, can so be made and called in one process, as a dry run does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def pretend(rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of `world_size` processes inside; a world of one process needs no pretence."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
