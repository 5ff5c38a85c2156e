"""The torch types behind the precision policy of `model.config`."""

import torch

from model.config import Compute

_DTYPES = {Compute.bf16: torch.bfloat16, Compute.fp32: torch.float32, Compute.fp16: torch.float16}


def torch_dtype(compute: Compute) -> torch.dtype:
    """Return the type of GEMM inputs, activations and matrix parameters under `compute`."""
    return _DTYPES[compute]
