"""The feed-forward of all routed experts over rows sorted by expert (arXiv 2412.19437, section 2.1.2).

Expert e owns `counts[e]` consecutive rows. On a CPU one GEMM per expert is as fast as anything grouped, as
long as shapes recur: the BF16 GEMM library prepares a kernel for every row count that it has not seen, which
takes ten times as long as the GEMM, and routing brings new counts at every step. So each expert's GEMMs run
over a WINDOW, its rows rounded up to a multiple of 64:

* Windows of inputs reach into the next expert's rows. What they compute there is overwritten by that expert,
  which comes later, or (the intermediates) lies in padding rows of its own.
* Weight gradients sum over rows, so padding rows must count nothing: their routing weight is 0, hence so are
  their SwiGLU output and the gradients of gate and up.

Only rows, gate, up and weights are kept; the SwiGLU output is computed again in the backward pass, as
DeepSeek-V3 does (section 3.2.3). Element-wise arithmetic is FP32. Gradients of all experts' weights are
written into one tensor per weight.

Legend: R routed rows, D hidden, I intermediate, E experts; W rows of one expert's window, X rows of all
windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import wide_type
from model.kernels.swiglu import SwiGLUScratch

WINDOW_MULTIPLE = 64


def expert_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    row_weights_R: Tensor,
) -> Tensor:
    """Return weight_r * (silu(x_r w1_e^T) * (x_r w3_e^T)) w2_e^T of each row r and its expert e, [R, D].

    rows [R, D] sorted by expert, in the type of w1, w3 [E, I, D] and w2 [E, D, I]; counts: rows per expert,
    in order, zeros allowed, summing to R; row_weights [R] FP32. Differentiable in all tensors;
    experts without rows get zero gradients. Tensors that are not on the CPU go to torch's grouped_mm.
    """
    if rows_RD.device.type != "cpu":
        return _grouped_mm_ffn(rows_RD, w1_EID, w3_EID, w2_EDI, counts, row_weights_R)
    out: Any = _ExpertFFN.apply(rows_RD, w1_EID, w3_EID, w2_EDI, row_weights_R, counts)
    return out


def _grouped_mm_ffn(
    rows_RD: Tensor, w1_EID: Tensor, w3_EID: Tensor, w2_EDI: Tensor, counts: list[int], weights_R: Tensor
) -> Tensor:
    ends_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows_RD.device)
    gate_RI = F.grouped_mm(rows_RD, w1_EID.transpose(1, 2), offs=ends_E)
    up_RI = F.grouped_mm(rows_RD, w3_EID.transpose(1, 2), offs=ends_E)
    hidden_RI = (F.silu(gate_RI.float()) * up_RI.float() * weights_R[:, None]).to(rows_RD.dtype)
    return F.grouped_mm(hidden_RI, w2_EDI.transpose(1, 2), offs=ends_E)


@dataclass(frozen=True)
class _Window:
    """Rows [start, start + count) of expert `expert`, and its window [pad_start, pad_start + size) in X."""

    expert: int
    start: int
    count: int
    pad_start: int
    size: int

    def read(self, rows_RD: Tensor) -> Tensor:
        """Return W rows from `start` on: a view, or at the end of `rows` a copy with zeros behind."""
        if self.start + self.size <= len(rows_RD):
            return rows_RD[self.start : self.start + self.size]
        window_WD = rows_RD.new_zeros(self.size, rows_RD.shape[1])
        window_WD[: self.count] = rows_RD[self.start : self.start + self.count]
        return window_WD

    def target(self, rows_RD: Tensor) -> Tensor:
        """Return the W rows that a GEMM may overwrite: a view, or at the end of `rows` a temporary."""
        if self.start + self.size <= len(rows_RD):
            return rows_RD[self.start : self.start + self.size]
        return rows_RD.new_empty(self.size, rows_RD.shape[1])

    def keep(self, target_WD: Tensor, rows_RD: Tensor) -> None:
        """Copy the expert's own rows out of `target` if that is a temporary."""
        if self.start + self.size > len(rows_RD):
            rows_RD[self.start : self.start + self.count] = target_WD[: self.count]


def _windows(counts: list[int]) -> Iterator[_Window]:
    """Yield the windows of all experts that have rows."""
    start = pad_start = 0
    for expert, count in enumerate(counts):
        size = -(-count // WINDOW_MULTIPLE) * WINDOW_MULTIPLE
        if count:
            yield _Window(expert, start, count, pad_start, size)
        start, pad_start = start + count, pad_start + size


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        row_weights_R: Tensor,
        counts: list[int],
    ) -> Tensor:
        rows_RD = rows_RD.contiguous()
        windows = list(_windows(counts))
        gate_XI, up_XI, weights_X1 = _window_tensors(windows, rows_RD, w1_EID.shape[1], row_weights_R)
        out_RD = torch.empty_like(rows_RD)
        (hidden_PI,), scratch = _temporaries(windows, gate_XI, 1)
        w1_EDI, w3_EDI, w2_EID = (w.transpose(1, 2).unbind(0) for w in (w1_EID, w3_EID, w2_EDI))
        parts = zip(windows, *_split(windows, gate_XI, up_XI, weights_X1), strict=True)
        for window, gate_WI, up_WI, weights_W1 in parts:
            expert, hidden_WI = window.expert, hidden_PI[: window.size]
            rows_WD = window.read(rows_RD)
            torch.mm(rows_WD, w1_EDI[expert], out=gate_WI)
            torch.mm(rows_WD, w3_EDI[expert], out=up_WI)
            scratch.forward(gate_WI, up_WI, weights_W1, hidden_WI)
            out_WD = window.target(out_RD)
            torch.mm(hidden_WI, w2_EID[expert], out=out_WD)
            window.keep(out_WD, out_RD)
        ctx.windows = windows
        ctx.save_for_backward(rows_RD, w1_EID, w3_EID, w2_EDI, gate_XI, up_XI, weights_X1)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        rows_RD, w1_EID, w3_EID, w2_EDI, gate_XI, up_XI, weights_X1 = ctx.saved_tensors
        windows: list[_Window] = ctx.windows
        dout_RD = grads[0].contiguous()
        drows_RD, dweights_R = torch.empty_like(rows_RD), weights_X1.new_empty(len(rows_RD))
        dw1_EID, dw3_EID, dw2_EDI = _weight_gradients(windows, w1_EID, w3_EID, w2_EDI)
        (hidden_PI, dgate_PI, dup_PI), scratch = _temporaries(windows, gate_XI, 3)
        parts = zip(windows, *_split(windows, gate_XI, up_XI, weights_X1), strict=True)
        for window, gate_WI, up_WI, weights_W1 in parts:
            expert = window.expert
            hidden_WI, dgate_WI, dup_WI = (x[: window.size] for x in (hidden_PI, dgate_PI, dup_PI))
            rows_WD, dout_WD = window.read(rows_RD), window.read(dout_RD)
            torch.mm(dout_WD, w2_EDI[expert], out=dgate_WI)  # the gradient of the weighted SwiGLU output
            dweights_W = scratch.weighted_backward(
                gate_WI, up_WI, weights_W1, dgate_WI, dgate_WI, dup_WI, hidden_WI
            )
            dweights_R[window.start : window.start + window.count] = dweights_W[: window.count]
            torch.mm(dout_WD.T, hidden_WI, out=dw2_EDI[expert])
            torch.mm(dgate_WI.T, rows_WD, out=dw1_EID[expert])
            torch.mm(dup_WI.T, rows_WD, out=dw3_EID[expert])
            drows_WD = window.target(drows_RD)
            torch.mm(dgate_WI, w1_EID[expert], out=drows_WD)
            torch.addmm(drows_WD, dup_WI, w3_EID[expert], out=drows_WD)
            window.keep(drows_WD, drows_RD)
        return drows_RD, dw1_EID, dw3_EID, dw2_EDI, dweights_R, None


def _window_tensors(
    windows: list[_Window], rows_RD: Tensor, width: int, row_weights_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate and up [X, I], not filled, and the row weights [X, 1], zero in padding rows."""
    num_rows = sum(window.size for window in windows)
    gate_XI, up_XI = rows_RD.new_empty(num_rows, width), rows_RD.new_empty(num_rows, width)
    weights_X1 = torch.zeros(num_rows, 1, dtype=wide_type(rows_RD))
    for window in windows:
        own = slice(window.pad_start, window.pad_start + window.count)
        weights_X1[own, 0] = row_weights_R[window.start : window.start + window.count]
    return gate_XI, up_XI, weights_X1


def _split(windows: list[_Window], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return of each tensor [X, ...] its parts [W, ...] by window."""
    sizes = [window.size for window in windows]
    return [tensor.split(sizes) for tensor in tensors]


def _temporaries(windows: list[_Window], gate_XI: Tensor, number: int) -> tuple[list[Tensor], SwiGLUScratch]:
    """Return `number` tensors of the type of gate and FP32 scratch, as large as the largest window."""
    most, width = max((window.size for window in windows), default=0), gate_XI.shape[1]
    buffers = [gate_XI.new_empty(most, width) for _ in range(number)]
    return buffers, SwiGLUScratch(most, width, dtype=wide_type(gate_XI))


def _weight_gradients(windows: list[_Window], *weights: Tensor) -> list[Tensor]:
    """Return tensors for the gradients of stacked weights, zero where an expert has no rows."""
    empty = sorted(set(range(len(weights[0]))) - {window.expert for window in windows})
    grads = [torch.empty_like(weight) for weight in weights]
    for grad in grads:
        grad[empty] = 0
    return grads
