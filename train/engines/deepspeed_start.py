"""Make DeepSpeed talk over the process groups that exist already, without compiling anything.

DeepSpeed takes "no group" for the group of all processes, whereas a `Group` of one process has no handle. So
each `Group` goes through `Handles` before DeepSpeed sees it.
"""

import logging
import os
import warnings
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.utils import logger

from parallel.groups import Group

with warnings.catch_warnings():
    # DeepSpeed would import it at its first sum of gradients; with it comes torch's compiler, unused
    warnings.simplefilter("ignore", DeprecationWarning)
    import deepspeed.runtime.zero.muon.muon_optimizer


class Handles:
    """The process groups behind groups, once torch.distributed and DeepSpeed's layer over it are ready."""

    def __init__(self, device: torch.device) -> None:
        if not dist.is_initialized():  # one process, started without a launcher
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # DeepSpeed asks the launcher's variables which device of this machine to use
        place = {
            "RANK": dist.get_rank(),
            "WORLD_SIZE": dist.get_world_size(),
            "LOCAL_RANK": device.index or 0,
        }
        for name, value in place.items():
            os.environ.setdefault(name, str(value))
        # of calls that DeepSpeed makes, also in hooks of a forward pass
        calls = "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated"
        warnings.filterwarnings("ignore", message=calls, category=FutureWarning)
        logger.addFilter(_is_news)
        # one is a shared-memory all-reduce that DeepSpeed would compile at this moment, for minutes
        deepspeed.ops.__dict__["__compatible_ops__"] = dict[str, bool]()
        deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
        self._alone: Any = None

    def of(self, group: Group) -> dist.ProcessGroup:
        """Return the process group of `group`; no other process needs to take part."""
        if group.handle is not None:
            return group.handle
        if self._alone is None:
            self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return self._alone


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message of DeepSpeed's tells something that is neither handled nor reported here.

    Dataclasses among inputs and outputs of modules are handled (train/engines/deepspeed_stage3.py), and the
    trainer reports steps that are left out.
    """
    known = ("unknown inputs or outputs type", "OVERFLOW! Skipping step")
    return not any(text in record.getMessage() for text in known)
