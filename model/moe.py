"""The DeepSeekMoE layer: a gate, routed experts, and shared experts that see every token (arXiv 2401.06066).

Legend: B sequences, S length, T = B * S, D hidden, R routed rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Recompute
from model.dispatch import Dispatched, LocalDispatcher, TokenDispatcher
from model.experts import Experts
from model.feedforward import FeedForward
from model.router import Router, Routing


@dataclass(frozen=True)
class ExpertOutput:
    """rows_RD: the routed experts' weighted output; shared_TD: the shared experts', None without any."""

    rows_RD: Tensor
    shared_TD: Tensor | None


class MoE(nn.Module):
    """route, dispatch, experts, combine; `dispatcher` is the seam for experts that live elsewhere."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, recompute: Recompute) -> None:
        super().__init__()
        moe = config.moe
        self.gate = Router(moe, config.hidden_size)
        self.experts = Experts(moe, config.hidden_size, dtype=dtype)
        self.shared_experts: FeedForward | None = None
        if moe.num_shared_experts > 0:
            width = moe.num_shared_experts * moe.intermediate_size
            self.shared_experts = FeedForward(config.hidden_size, width, dtype=dtype, recompute=recompute)
        self.dispatcher: TokenDispatcher = LocalDispatcher(recompute)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """Return the layer's output [B, S, D] and the routing it followed."""
        routing = self.gate(x_BSD)
        dispatched = self.dispatch(x_BSD, routing)
        y_TD = self.combine(self.run_experts(x_BSD, dispatched), dispatched)
        return y_TD.view(x_BSD.shape), routing

    def dispatch(self, x_BSD: Tensor, routing: Routing) -> Dispatched:
        """Send every token to its experts."""
        return self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)

    def run_experts(self, x_BSD: Tensor, dispatched: Dispatched) -> ExpertOutput:
        """Run the routed experts on the rows that arrived, and the shared ones on the local tokens."""
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_BSD).flatten(0, 1)
        return ExpertOutput(self.experts(dispatched), shared_TD)

    def combine(self, output: ExpertOutput, dispatched: Dispatched) -> Tensor:
        """Return the sum of routed and shared output per token; [T, D]."""
        y_TD = self.dispatcher.combine(output.rows_RD, dispatched)
        return y_TD if output.shared_TD is None else y_TD + output.shared_TD
