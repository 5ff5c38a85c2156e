"""Linear maps without bias, and the seam through which another GEMM replaces the plain one.

Legend: D input width, O output width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gemm(Protocol):
    """What multiplies activations by a weight: x [..., D] and weight [O, D] to x weight^T [..., O]."""

    def __call__(self, x: Tensor, weight: Tensor, /) -> Tensor:
        """Return x weight^T, differentiable in both."""
        ...


class Linear(nn.Module):
    """y = x W^T with W [O, D]; `gemm` may be replaced by a low-precision or a gradient-deferring product."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.gemm: Gemm = F.linear

    def forward(self, x: Tensor, *, gemm: Gemm | None = None) -> Tensor:
        """Return x W^T for x [..., D], shape [..., O]; by `gemm`, where that is given, this once.

        Whoever multiplies by a weight comes through here: an engine that spreads weights over processes
        gathers them when a module is called.
        """
        return (gemm or self.gemm)(x, self.weight)
