"""RMSNorm (arXiv 1910.07467) with FP32 arithmetic and one pass over memory each way.

    r_t = (mean_d x_td^2 + eps)^-1/2,   y = x r w
    dw = sum_t dy x r,   dx = r (dy w - x r * mean_d(dy w x r))

Legend: T rows, D width; N rows of one block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import row_blocks, scratch_rows, wide_type


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; any [..., D], type of x.

    weight is FP32 (or FP64 with an FP64 x). Tensors that are not on the CPU go to torch's rms_norm, with the
    weight in FP32 arithmetic all the same.
    """
    if x_TD.device.type != "cpu":
        return F.rms_norm(x_TD.to(weight_D.dtype), weight_D.shape, weight_D, eps).to(x_TD.dtype)
    out: Any = _RMSNorm.apply(x_TD, weight_D, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        width = weight_D.shape[0]
        x_TD = x.reshape(-1, width)
        out_TD = torch.empty(x_TD.shape, dtype=x.dtype)
        r_T1 = torch.empty(len(x_TD), 1, dtype=wide_type(x))
        wide_ND = torch.empty(scratch_rows(*x_TD.shape), width, dtype=wide_type(x))
        for rows in row_blocks(*x_TD.shape):
            x_ND, r_N1 = wide_ND[: rows.stop - rows.start].copy_(x_TD[rows]), r_T1[rows]
            torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, out=r_N1)
            r_N1.square_().div_(width).add_(eps).rsqrt_()
            out_TD[rows] = x_ND.mul_(r_N1).mul_(weight_D)
        ctx.save_for_backward(x, weight_D, r_T1)
        return out_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, r_T1 = ctx.saved_tensors
        width = weight_D.shape[0]
        x_TD, dy_TD = x.reshape(-1, width), grads[0].reshape(-1, width)
        dx_TD, dweight_D = torch.empty(x_TD.shape, dtype=x.dtype), torch.zeros_like(weight_D)
        scratch_rows_ = scratch_rows(*x_TD.shape)
        wide_ND, grad_ND, work_ND = (torch.empty(scratch_rows_, width, dtype=wide_type(x)) for _ in range(3))
        mean_D1, ones_N = weight_D[:, None] / width, torch.ones(scratch_rows_, dtype=wide_type(x))
        for rows in row_blocks(*x_TD.shape):
            size, r_N1 = rows.stop - rows.start, r_T1[rows]
            normed_ND = wide_ND[:size].copy_(x_TD[rows]).mul_(r_N1)
            dy_ND = grad_ND[:size].copy_(dy_TD[rows])
            product_ND = torch.mul(normed_ND, dy_ND, out=work_ND[:size])
            dweight_D.addmv_(product_ND.T, ones_N[:size])
            normed_ND.mul_(product_ND @ mean_D1)
            dx_TD[rows] = dy_ND.mul_(weight_D).sub_(normed_ND).mul_(r_N1)
        return dx_TD.view(x.shape), dweight_D, None
