"""Rotary rotation of interleaved pairs (arXiv 2104.09864): a complex multiplication.

The pair (x0, x1) is the number x0 + i x1, the rotation by an angle the factor cos + i sin; the gradient is
the rotation by the opposite angle. FP32 arithmetic.

Legend: B sequences, S length, H heads, P rotary width, F = P / 2 pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import wide_type


def rotate(x_BSHP: Tensor, table_BS2F: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... of x; contiguous result, shape and type of x.

    table [B, S, 2, F]: table[:, :, 0] is cos, table[:, :, 1] is sin, FP32 (FP64 for an FP64 x), no gradient.
    B of the table may be 1. The same torch operations run on every device.
    """
    out: Any = _Rotate.apply(x_BSHP, table_BS2F)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHP: Tensor, table_BS2F: Tensor) -> Tensor:
        ctx.save_for_backward(table_BS2F)
        return _multiply(x_BSHP, _factors(table_BS2F, wide_type(x_BSHP)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (table_BS2F,) = ctx.saved_tensors
        return _multiply(grads[0], _factors(table_BS2F, wide_type(grads[0])).conj()), None


def _factors(table_BS2F: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cos + i sin, [B, S, 1, F]."""
    return torch.complex(table_BS2F[:, :, :1].to(dtype), table_BS2F[:, :, 1:].to(dtype))


def _multiply(x_BSHP: Tensor, factors_BS1F: Tensor) -> Tensor:
    wide_BSHP = torch.empty(x_BSHP.shape, dtype=wide_type(x_BSHP), device=x_BSHP.device).copy_(x_BSHP)
    torch.view_as_complex(wide_BSHP.unflatten(-1, (-1, 2))).mul_(factors_BS1F)
    return wide_BSHP.to(x_BSHP.dtype)
