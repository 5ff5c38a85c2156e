"""The dense SwiGLU network of the first layers and of the shared experts (arXiv 2002.05202).

Legend: B sequences, S length, D hidden, I intermediate.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import Recompute
from model.kernels.swiglu import swiglu
from model.linear import Linear
from model.recompute import region
from model.split import SequenceSplit, WholeSequences


class GatedGemm(Protocol):
    """What multiplies SwiGLU of up and gate [..., I] by the weight of the down projection, [D, I]."""

    def __call__(self, up: Tensor, gate: Tensor, weight_DI: Tensor, /) -> Tensor:
        """Return (silu(gate) * up) weight^T [..., D], differentiable in all three."""
        ...


class FeedForward(nn.Module):
    """w2 (silu(w1 x) * w3 x); w1 is the gate, w3 the up and w2 the down projection.

    `gated_gemm`, where it is given, takes the place of SwiGLU and w2's product: a low-precision product may
    want gate and up, rather than their product, for its backward pass.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.w1 = Linear(hidden_size, intermediate_size, dtype=dtype)
        self.w2 = Linear(intermediate_size, hidden_size, dtype=dtype)
        self.w3 = Linear(hidden_size, intermediate_size, dtype=dtype)
        self.gated_gemm: GatedGemm | None = None
        self.split: SequenceSplit = WholeSequences()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the network's output, shape and type of x [B, S, D]."""
        x_BSD = self.split.gather(x_BSD)
        gate_BSI, up_BSI = self.w1(x_BSD), self.w3(x_BSD)
        if self.gated_gemm is not None:
            y_BSD = self.w2(gate_BSI, gemm=partial(self.gated_gemm, up_BSI))
        else:
            y_BSD = self.w2(region(self.recompute, swiglu, gate_BSI, up_BSI))
        return self.split.scatter(y_BSD)
