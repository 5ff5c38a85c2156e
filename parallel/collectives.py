"""Differentiable collectives: each is the other's gradient, and all of them sum.

    gather rows   forward all-gather,      backward reduce-scatter
    scatter rows  forward reduce-scatter,  backward all-gather
    exchange      forward all-to-all,      backward all-to-all with the splits swapped

Rows are the first dimension. `gather_tokens` and `scatter_tokens` do the same along a sequence.

Legend: B sequences, s own tokens, S tokens of the group, N processes of the group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.groups import Group


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grads[0]), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grads[0]), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, received: Sequence[int] | None, sent: Sequence[int] | None
    ) -> Tensor:
        ctx.group, ctx.received, ctx.sent = group, received, sent
        return group.all_to_all(x, received, sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.all_to_all(grads[0], ctx.sent, ctx.received), None, None, None


def all_gather_rows(x: Tensor, group: Group) -> Tensor:
    """Return everybody's x (of one shape) concatenated along dim 0; the gradient is summed and scattered."""
    out: Any = x if group.size == 1 else _GatherRows.apply(x, group)
    return out


def reduce_scatter_rows(x: Tensor, group: Group) -> Tensor:
    """Return this rank's rows of the sum of x over the group; the gradient is gathered."""
    out: Any = x if group.size == 1 else _ScatterRows.apply(x, group)
    return out


def exchange(
    x: Tensor, group: Group, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
) -> Tensor:
    """Send sent[i] rows of x to process i and return the rows received, in rank order; None: equal parts."""
    out: Any = x if group.size == 1 else _Exchange.apply(x, group, received, sent)
    return out


def gather_tokens(x_BsX: Tensor, group: Group) -> Tensor:
    """Return [B, S, ...]: the tokens of every process, in rank order; gradients are summed and scattered."""
    if group.size == 1:
        return x_BsX
    x_NBsX = all_gather_rows(x_BsX, group).unflatten(0, (group.size, -1))
    return x_NBsX.transpose(0, 1).flatten(1, 2)


def scatter_tokens(x_BSX: Tensor, group: Group) -> Tensor:
    """Return [B, s, ...]: this process's tokens of the sum over the group; the gradient is gathered."""
    if group.size == 1:
        return x_BSX
    x_NBsX = x_BSX.unflatten(1, (group.size, -1)).transpose(0, 1)
    return reduce_scatter_rows(x_NBsX.flatten(0, 1), group)
