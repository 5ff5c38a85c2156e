"""The dense SwiGLU network of the first layers and of the shared experts (arXiv 2002.05202).

Legend: B sequences, S length, D hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from model.config import Recompute
from model.kernels.swiglu import swiglu
from model.linear import Linear
from model.recompute import region
from model.split import SequenceSplit, WholeSequences


class FeedForward(nn.Module):
    """w2 (silu(w1 x) * w3 x); w1 is the gate, w3 the up and w2 the down projection."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.w1 = Linear(hidden_size, intermediate_size, dtype=dtype)
        self.w2 = Linear(intermediate_size, hidden_size, dtype=dtype)
        self.w3 = Linear(hidden_size, intermediate_size, dtype=dtype)
        self.split: SequenceSplit = WholeSequences()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the network's output, shape and type of x [B, S, D]."""
        x_BSD = self.split.gather(x_BSD)
        return self.split.scatter(self.w2(region(self.recompute, swiglu, self.w1(x_BSD), self.w3(x_BSD))))
