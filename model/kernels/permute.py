"""Moving token rows to experts and back.

`permute` copies each token's row to every place where an expert chosen for it will read it; `combine` sums
those places. Each is the other's gradient, so both directions are a gather or a sum of gathers, and no
scatter with atomic or colliding writes exists: results do not depend on the number of threads.

Legend: T tokens, D hidden, A experts per token, R = T * A routed rows, sorted by expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import row_blocks, scratch_rows, wide_type


@dataclass(frozen=True)
class RowOrder:
    """The order of routed rows sorted by expert, stable in (token, choice).

    choice_R [R]: flat index t * A + a of the choice that row r is (gathers a [T, A] tensor into row order).
    token_R [R]: the token of row r. row_TA [T, A]: the row of choice a of token t (the inverse).
    """

    choice_R: Tensor
    token_R: Tensor
    row_TA: Tensor


def sort_by_expert(indices_TA: Tensor) -> RowOrder:
    """Return the row order that sorts the choices by expert index; indices int64 [T, A]."""
    choice_R = indices_TA.flatten().argsort(stable=True)
    row_TA = torch.empty_like(choice_R)
    row_TA[choice_R] = torch.arange(choice_R.numel(), device=choice_R.device)
    return RowOrder(choice_R, choice_R // indices_TA.shape[1], row_TA.view(indices_TA.shape))


def permute(x_TD: Tensor, order: RowOrder) -> Tensor:
    """Return row token_R[r] of x as row r, shape [R, D]; the gradient sums a token's rows in FP32."""
    rows: Any = _Permute.apply(x_TD, order)
    return rows


def combine(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Return for each token the sum of its A rows, summed in FP32, shape [T, D], type of rows."""
    y: Any = _Combine.apply(rows_RD, order)
    return y


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TD.index_select(0, order.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0], ctx.order.row_TA), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return _sum_rows(rows_RD, order.row_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.order.token_R), None


def _sum_rows(rows_RD: Tensor, row_TA: Tensor) -> Tensor:
    """Return out[t] = sum_a rows[row_TA[t, a]], summed in FP32, [T, D], type of rows."""
    (num_tokens, top_k), width = row_TA.shape, rows_RD.shape[1]
    if rows_RD.device.type != "cpu":
        return rows_RD[row_TA].sum(1, dtype=wide_type(rows_RD)).to(rows_RD.dtype)
    out_TD = rows_RD.new_empty(num_tokens, width)
    sum_ND = rows_RD.new_empty(scratch_rows(num_tokens, width), width, dtype=wide_type(rows_RD))
    one_ND = torch.empty_like(sum_ND)
    row_AT = row_TA.T.contiguous()
    for block in row_blocks(num_tokens, width):
        size = block.stop - block.start
        total_ND = sum_ND[:size].copy_(rows_RD.index_select(0, row_AT[0, block]))
        for choice in range(1, top_k):
            total_ND += one_ND[:size].copy_(rows_RD.index_select(0, row_AT[choice, block]))
        out_TD[block] = total_ND
    return out_TD
