"""Token embedding, and the seam through which a table whose rows lie elsewhere is looked up.

Legend: V vocabulary, D hidden, T tokens.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Fp32GradientLookup(torch.autograd.Function):
    """Row lookup whose gradient is summed, and handed on, in FP32.

    The plain lookup on the CPU sums the gradient of a frequent token in the type of the table. In BF16 a sum
    stops growing at 256 times its summands, and a common token occurs far more often in a microbatch.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight_VD.shape
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        rows_TD = grad_outputs[0].flatten(0, -2).float()
        grad_VD = torch.zeros(ctx.shape, dtype=torch.float32, device=rows_TD.device)
        return None, grad_VD.index_add_(0, tokens.flatten(), rows_TD)


class Lookup(Protocol):
    """What finds the rows of tokens: int64 tokens [N, S] and weight [V, D] to [N, S, D]."""

    def __call__(self, tokens: Tensor, weight_VD: Tensor, /) -> Tensor:
        """Return the rows of the tokens, differentiable in the weight."""
        ...


def look_up(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the rows of the tokens, shape [..., D]."""
    # other devices sum in FP32 by themselves, and in a fixed order, which index_add_ there has not
    if tokens.device.type == "cpu" and weight_VD.dtype != torch.float32:
        rows: Any = _Fp32GradientLookup.apply(tokens, weight_VD)
        return rows
    return F.embedding(tokens, weight_VD)


class Embedding(nn.Module):
    """Token embedding, weight [V, D]; `lookup` may be replaced where the rows are spread over devices."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))
        self.lookup: Lookup = look_up

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of the tokens [N, S], shape [N, S, D] (or of this device's share of the tokens)."""
        return self.lookup(tokens, self.weight)
