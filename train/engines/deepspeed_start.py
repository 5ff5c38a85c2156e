"""Make DeepSpeed talk over the process groups that exist already, without compiling anything.

DeepSpeed takes "no group" for the group of all processes, whereas a `Group` of one process has no handle. So
each `Group` goes through `Handles` before DeepSpeed sees it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist

from parallel.groups import Group


class Handles:
    """The process groups behind groups, once torch.distributed and DeepSpeed's layer over it are ready."""

    def __init__(self, device: torch.device) -> None:
        if not dist.is_initialized():  # one process, started without a launcher
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # a shared-memory all-reduce that DeepSpeed would compile at this moment, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
        self._alone: dist.ProcessGroup | None = None

    def of(self, group: Group) -> dist.ProcessGroup:
        """Return the process group of `group`; no other process needs to take part."""
        if group.handle is not None:
            return group.handle
        if self._alone is None:
            self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return self._alone


@contextmanager
def local_rank(device: torch.device) -> Iterator[None]:
    """Tell DeepSpeed which device of this machine to use: it asks the variable that torchrun sets."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
