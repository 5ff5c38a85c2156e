"""The routed experts: a stack of SwiGLU networks applied to rows sorted by expert.

Legend: E experts, D hidden, I expert intermediate, R routed rows.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from model.config import MoEConfig
from model.dispatch import Dispatched
from model.kernels.grouped_gemm import expert_ffn


class GroupedFeedForward(Protocol):
    """What runs all experts at once; arguments as in `model.kernels.grouped_gemm.expert_ffn`."""

    def __call__(
        self,
        rows_RD: Tensor,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        counts: list[int],
        row_weights_R: Tensor,
        /,
    ) -> Tensor:
        """Return the weighted expert output of each row, [R, D], differentiable in rows and weights."""
        ...


class Experts(nn.Module):
    """w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]; `feed_forward` may be replaced like a GEMM."""

    def __init__(self, config: MoEConfig, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        up_shape = (config.num_experts, config.intermediate_size, hidden_size)
        self.w1 = nn.Parameter(torch.empty(up_shape, dtype=dtype))
        self.w2 = nn.Parameter(
            torch.empty(config.num_experts, hidden_size, config.intermediate_size, dtype=dtype)
        )
        self.w3 = nn.Parameter(torch.empty(up_shape, dtype=dtype))
        self.feed_forward: GroupedFeedForward = expert_ffn

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Return the expert output of every row, times its routing weight; [R, D].

        The weight scales the SwiGLU output before w2, which is the same as scaling the result.
        """
        return self.feed_forward(
            dispatched.rows_RD, self.w1, self.w3, self.w2, dispatched.counts, dispatched.row_weights_R
        )
