"""Multi-token prediction (arXiv 2412.19437, section 2.2).

Depth k turns the hidden state of position i, which has seen tokens up to i + k - 1, and the embedding of
token i + k into the hidden state that predicts token i + k + 1. The state it starts from is the one the
head sees, after the final norm of the depth before: so are the released weights used.

Legend: B sequences, S length, D hidden.
"""

import torch
from torch import Tensor, nn

from model.block import Block, BlockOutput
from model.config import ModelConfig, Recompute
from model.linear import Linear
from model.norm import RMSNorm
from model.recompute import region, saving


class MtpLayer(nn.Module):
    """One depth: norm(block(eh_proj [enorm(embedding); hnorm(hidden)])); embedding and head are shared."""

    def __init__(
        self, config: ModelConfig, block: Block, *, dtype: torch.dtype, recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.enorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, dtype=dtype)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        embedding_BSD: Tensor,
        hidden_BSD: Tensor,
        table_BS2F: Tensor,
        positions_BS: Tensor,
        *,
        balance_scale: float = 0.0,
    ) -> BlockOutput:
        """Return the normalised hidden states of this depth, ready for the head, and the block's load."""
        x_BSD = self.join(embedding_BSD, hidden_BSD)
        output = self.block(x_BSD, table_BS2F, positions_BS, balance_scale=balance_scale)
        return output._replace(x_BSD=self.norm(output.x_BSD))

    def join(self, embedding_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
        """Return the input of the block, [B, S, D]."""
        with saving(self.recompute):
            return self.eh_proj(region(self.recompute, self._concatenate, embedding_BSD, hidden_BSD))

    def _concatenate(self, embedding_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedding_BSD), self.hnorm(hidden_BSD)), dim=-1)
