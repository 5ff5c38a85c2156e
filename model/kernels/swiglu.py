"""SwiGLU: silu(gate) * up (arXiv 2002.05202), with FP32 arithmetic and one pass over memory.

Only gate and up are kept for the backward pass; the product is never needed there, and whoever needs it (the
down projection's weight gradient) computes it again.

Legend: T rows, I width; N rows of one block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import row_blocks, scratch_rows, wide_type


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """Return silu(gate) * up, shape and type of gate; gate and up are alike, any [..., I].

    Tensors that are not on the CPU go through torch's own operations.
    """
    if gate_TI.device.type != "cpu":
        return F.silu(gate_TI) * up_TI
    out: Any = _SwiGLU.apply(gate_TI, up_TI)
    return out


class SwiGLUScratch:
    """FP32 scratch for blocks of rows, and the two passes over one block."""

    def __init__(self, num_rows: int, width: int, *, dtype: torch.dtype) -> None:
        self._tensors_4NI = torch.empty(4, num_rows, width, dtype=dtype)
        self._views: dict[int, list[Tensor]] = {}

    def _first_rows(self, rows: int) -> list[Tensor]:
        """Return four tensors [rows, I], made once per row count: a view costs as much as a small op."""
        if rows not in self._views:
            self._views[rows] = list(self._tensors_4NI[:, :rows].unbind(0))
        return self._views[rows]

    def forward(self, gate_NI: Tensor, up_NI: Tensor, weights_N1: Tensor | None, out_NI: Tensor) -> None:
        """Write silu(gate) * up * weights to `out`."""
        wide_NI, work_NI, _, _ = self._first_rows(len(gate_NI))
        torch.ops.aten.silu.out(wide_NI.copy_(gate_NI), out=work_NI)
        work_NI.mul_(wide_NI.copy_(up_NI))
        if weights_N1 is not None:
            work_NI.mul_(weights_N1)
        out_NI.copy_(work_NI)

    def backward(
        self, gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor, dgate_NI: Tensor, dup_NI: Tensor
    ) -> None:
        """Write the gradients of gate and up, given that of silu(gate) * up; outputs may be the inputs."""
        gate32_NI, up32_NI, grad32_NI, work_NI = self._first_rows(len(gate_NI))
        gate32_NI.copy_(gate_NI)
        up32_NI.copy_(up_NI)
        grad32_NI.copy_(grad_NI)
        torch.ops.aten.silu.out(gate32_NI, out=work_NI)
        dup_NI.copy_(work_NI.mul_(grad32_NI))
        torch.ops.aten.silu_backward.grad_input(grad32_NI.mul_(up32_NI), gate32_NI, grad_input=work_NI)
        dgate_NI.copy_(work_NI)

    def weighted_backward(
        self,
        gate_NI: Tensor,
        up_NI: Tensor,
        weights_N1: Tensor,
        grad_NI: Tensor,
        dgate_NI: Tensor,
        dup_NI: Tensor,
        out_NI: Tensor,
    ) -> Tensor:
        """Do the same for silu(gate) * up * weights; write that product to `out`, return dweights [N]."""
        gate32_NI, up32_NI, grad32_NI, work_NI = self._first_rows(len(gate_NI))
        gate32_NI.copy_(gate_NI)
        up32_NI.copy_(up_NI)
        grad32_NI.copy_(grad_NI)
        torch.ops.aten.silu.out(gate32_NI, out=work_NI)
        product_NI = work_NI * up32_NI
        dweights_N = torch.linalg.vecdot(product_NI, grad32_NI)
        out_NI.copy_(product_NI.mul_(weights_N1))
        grad32_NI.mul_(weights_N1)
        dup_NI.copy_(work_NI.mul_(grad32_NI))
        torch.ops.aten.silu_backward.grad_input(grad32_NI.mul_(up32_NI), gate32_NI, grad_input=work_NI)
        dgate_NI.copy_(work_NI)
        return dweights_N


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        gate_TI, up_TI, out_TI = (x.reshape(-1, gate.shape[-1]) for x in (gate, up, out))
        scratch = SwiGLUScratch(scratch_rows(*gate_TI.shape), gate.shape[-1], dtype=wide_type(gate))
        for rows in row_blocks(*gate_TI.shape):
            scratch.forward(gate_TI[rows], up_TI[rows], None, out_TI[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
        gate_TI, up_TI, grad_TI, dgate_TI, dup_TI = (
            x.reshape(-1, gate.shape[-1]) for x in (gate, up, grads[0], dgate, dup)
        )
        scratch = SwiGLUScratch(scratch_rows(*gate_TI.shape), gate.shape[-1], dtype=wide_type(gate))
        for rows in row_blocks(*gate_TI.shape):
            scratch.backward(gate_TI[rows], up_TI[rows], grad_TI[rows], dgate_TI[rows], dup_TI[rows])
        return dgate, dup
