"""One decoder layer as five phases: attend, route, dispatch, experts, combine.

`forward` runs them in order. A schedule that hides the exchange of tokens of one microbatch behind the
computation of another calls them itself; what passes between them is `Routed`, `Dispatched` and
`ExpertOutput`. A dense layer has two phases, attend and `feed_forward`.

Legend: B sequences, S length, T = B * S, D hidden, E experts, F rotary frequencies.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, Recompute, YarnConfig
from model.dispatch import Dispatched
from model.feedforward import FeedForward
from model.mla import MultiHeadLatentAttention
from model.moe import ExpertOutput, MoE
from model.norm import RMSNorm
from model.recompute import region, run_block, saving
from model.router import Routing


class BlockOutput(NamedTuple):
    """x_BSD: the new hidden states; load_E: int64, [0] in a dense layer; balance_loss: FP32, detached."""

    x_BSD: Tensor
    load_E: Tensor
    balance_loss: Tensor


@dataclass(frozen=True)
class Routed:
    """normed_BSD: the normalised input of gate and experts; routing: where its tokens go."""

    normed_BSD: Tensor
    routing: Routing


class _Attach(torch.autograd.Function):
    """Pass x through; in the backward pass give a loss that arises here the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad_outputs[0], torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach_loss(x: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return x, so that its backward pass also adds scale * d loss / d parameters to the gradients.

    The result is a view of x: add it to something before it leaves a pipeline stage.
    """
    attached: Any = _Attach.apply(x, loss, scale)
    return attached


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); `ffn` is dense or a mixture of experts."""

    def __init__(
        self,
        config: ModelConfig,
        ffn: FeedForward | MoE,
        *,
        dtype: torch.dtype,
        yarn: YarnConfig | None,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.dropout = config.dropout
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MultiHeadLatentAttention(config, dtype=dtype, yarn=yarn, recompute=recompute)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = ffn

    @property
    def moe(self) -> MoE:
        """Return the mixture of experts of this layer; a dense layer has none and raises TypeError."""
        if not isinstance(self.ffn, MoE):
            raise TypeError("a dense layer has no experts; run its feed_forward phase")
        return self.ffn

    def forward(
        self, x_BSD: Tensor, table_BS2F: Tensor, positions_BS: Tensor, *, balance_scale: float = 0.0
    ) -> BlockOutput:
        """Return the layer's output, its expert load and its balance loss.

        balance_scale: the gradient given to the balance loss (its weight alpha is inside it already).
        """

        def phases(x_BSD: Tensor, table_BS2F: Tensor, positions_BS: Tensor) -> BlockOutput:
            x_BSD = self.attend(x_BSD, table_BS2F, positions_BS)
            if not isinstance(self.ffn, MoE):
                no_load = torch.zeros(0, dtype=torch.int64, device=x_BSD.device)
                return BlockOutput(
                    self.feed_forward(x_BSD),
                    no_load,
                    torch.zeros((), dtype=torch.float32, device=x_BSD.device),
                )
            routed = self.route(x_BSD)
            dispatched = self.dispatch(routed)
            output = self.experts(routed, dispatched)
            x_BSD = self.combine(x_BSD, output, routed, dispatched, balance_scale=balance_scale)
            return BlockOutput(x_BSD, routed.routing.load_E, routed.routing.balance_loss.detach())

        return run_block(self.recompute, phases, x_BSD, table_BS2F, positions_BS)

    def attend(self, x_BSD: Tensor, table_BS2F: Tensor, positions_BS: Tensor) -> Tensor:
        """Return x + attention of the normalised x."""
        with saving(self.recompute):
            normed_BSD = region(self.recompute, self.attn_norm, x_BSD)
            return x_BSD + self._drop(self.attn(normed_BSD, table_BS2F, positions_BS))

    def feed_forward(self, x_BSD: Tensor) -> Tensor:
        """Return x + the dense network of the normalised x (a dense layer's second phase)."""
        with saving(self.recompute):
            return x_BSD + self._drop(self.ffn(region(self.recompute, self.ffn_norm, x_BSD)))

    def route(self, x_BSD: Tensor) -> Routed:
        """Normalise x and choose experts."""
        with saving(self.recompute):
            normed_BSD = region(self.recompute, self.ffn_norm, x_BSD)
            return Routed(normed_BSD, self.moe.gate(normed_BSD))

    def dispatch(self, routed: Routed) -> Dispatched:
        """Send the tokens to their experts (communication, where experts live elsewhere)."""
        with saving(self.recompute):
            return self.moe.dispatch(routed.normed_BSD, routed.routing)

    def experts(self, routed: Routed, dispatched: Dispatched) -> ExpertOutput:
        """Run the experts on the rows that arrived, and the shared experts on the local tokens."""
        with saving(self.recompute):
            return self.moe.run_experts(routed.normed_BSD, dispatched)

    def combine(
        self,
        x_BSD: Tensor,
        output: ExpertOutput,
        routed: Routed,
        dispatched: Dispatched,
        *,
        balance_scale: float,
    ) -> Tensor:
        """Return x + the experts' output per token (communication, where experts live elsewhere)."""
        with saving(self.recompute):
            y_TD = self.moe.combine(output, dispatched)
        return self.add(x_BSD, y_TD, routed.routing.balance_loss, balance_scale=balance_scale)

    def add(self, x_BSD: Tensor, y_TD: Tensor, balance_loss: Tensor, *, balance_scale: float) -> Tensor:
        """Return x + y, the output of all experts per token, with the balance loss attached."""
        with saving(self.recompute):
            y_BSD = y_TD.view(x_BSD.shape)
            if balance_scale:
                y_BSD = attach_loss(y_BSD, balance_loss, balance_scale)
            return x_BSD + self._drop(y_BSD)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
