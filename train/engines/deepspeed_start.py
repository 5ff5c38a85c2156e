"""Make DeepSpeed talk over the process groups that exist already, quietly and without compiling anything.

DeepSpeed is imported here and in what imports this, so runs with the default engine never load it. It chooses
its accelerator when it is imported, and it takes "no group" for the group of all processes: a `Group` of one
process, which has no handle of its own, needs a real group before DeepSpeed sees it.
"""

import os
from unittest.mock import patch

import torch
import torch.distributed as dist

from parallel.groups import Group

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it; ZeRO-3 wants to know even on a CPU

import deepspeed
import deepspeed.comm
from deepspeed.comm.torch import build_shm_op
