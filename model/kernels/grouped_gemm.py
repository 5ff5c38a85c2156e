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

The products that give these gradients may be put off (model/weight_gradients.py): `later` is asked for each
backward pass. What is put off keeps its factors, [X, I] three times, which otherwise share the memory of one
window.

Legend: R routed rows, D hidden, I intermediate, E experts, O output width; W rows of one expert's window,
X rows of all windows, P rows of the largest one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import wide_type
from model.kernels.swiglu import SwiGLUScratch

WINDOW_MULTIPLE = 64

AddGradients = Callable[..., None]
"""Adds the gradients of some weights, in place, to the tensors that it is given, one for each weight."""


class Later(Protocol):
    """Decides in each backward pass whether the gradients of weights are computed then or later."""

    def __call__(self, *weights: Tensor) -> Callable[[AddGradients], None] | None:
        """Return None for now, or what takes the function that will add them later."""
        ...


def now(*weights: Tensor) -> None:
    """Put nothing off."""


def expert_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    row_weights_R: Tensor,
    *,
    later: Later = now,
) -> Tensor:
    """Return weight_r * (silu(x_r w1_e^T) * (x_r w3_e^T)) w2_e^T of each row r and its expert e, [R, D].

    rows [R, D] sorted by expert, in the type of w1, w3 [E, I, D] and w2 [E, D, I]; counts: rows per expert,
    in order, zeros allowed, summing to R; row_weights [R] FP32. Differentiable in all tensors;
    experts without rows get zero gradients. `later` may put the gradients of w1, w3 and w2 off. Tensors that
    are not on the CPU go to torch's grouped_mm.
    """
    if rows_RD.device.type != "cpu":
        return _grouped_mm_ffn(rows_RD, w1_EID, w3_EID, w2_EDI, counts, row_weights_R, later)
    out: Any = _ExpertFFN.apply(rows_RD, w1_EID, w3_EID, w2_EDI, row_weights_R, counts, later)
    return out


def _grouped_mm_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    weights_R: Tensor,
    later: Later,
) -> Tensor:
    ends_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows_RD.device)
    gate_RI: Any = _GroupedLinear.apply(rows_RD, w1_EID, ends_E, later)
    up_RI: Any = _GroupedLinear.apply(rows_RD, w3_EID, ends_E, later)
    hidden_RI = (F.silu(gate_RI.float()) * up_RI.float() * weights_R[:, None]).to(rows_RD.dtype)
    out: Any = _GroupedLinear.apply(hidden_RI, w2_EDI, ends_E, later)
    return out


class _GroupedLinear(torch.autograd.Function):
    """x_r w_e^T of each row r and its expert e, [R, O], by grouped_mm, as are both gradients."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_EOD: Tensor, ends_E: Tensor, later: Later) -> Tensor:
        ctx.save_for_backward(x_RD, w_EOD, ends_E)
        ctx.weight, ctx.later = w_EOD, later  # the parameter: what was saved may come back without `grad`
        return F.grouped_mm(x_RD, w_EOD.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_RD, w_EOD, ends_E = ctx.saved_tensors
        x_RD = x_RD.detach()  # what waits for the weight's gradient must not keep the graph that x came from
        dout_RO = grads[0].contiguous()
        dx_RD = F.grouped_mm(dout_RO, w_EOD, offs=ends_E)
        put_off = ctx.later(ctx.weight)
        if put_off is None:
            return dx_RD, F.grouped_mm(dout_RO.T, x_RD, offs=ends_E), None, None
        put_off(lambda grad_EOD: grad_EOD.add_(F.grouped_mm(dout_RO.T, x_RD, offs=ends_E)))
        return dx_RD, None, None, None


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


class _Factors(NamedTuple):
    """Of one window: what the gradients of its expert's weights are products of."""

    expert: int
    rows_WD: Tensor
    dout_WD: Tensor
    hidden_WI: Tensor
    dgate_WI: Tensor
    dup_WI: Tensor

    def multiply(self, dw1_ID: Tensor, dw3_ID: Tensor, dw2_DI: Tensor) -> None:
        """Write the gradients of the expert's weights."""
        torch.mm(self.dout_WD.T, self.hidden_WI, out=dw2_DI)
        torch.mm(self.dgate_WI.T, self.rows_WD, out=dw1_ID)
        torch.mm(self.dup_WI.T, self.rows_WD, out=dw3_ID)


def _add_products(windows: list[_Factors], dtype: torch.dtype, *grads_EXX: Tensor) -> None:
    """Add each window's gradients, rounded to `dtype` first, to those of w1, w3 and w2."""
    products = [torch.empty_like(grad_EXX[0], dtype=dtype) for grad_EXX in grads_EXX]
    for factors in windows:
        factors.multiply(*products)
        for grad_EXX, product in zip(grads_EXX, products, strict=True):
            grad_EXX[factors.expert] += product


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
        later: Later,
    ) -> Tensor:
        rows_RD = rows_RD.contiguous()
        windows = list(_windows(counts))
        gate_XI, up_XI, weights_X1 = _window_tensors(windows, rows_RD, w1_EID.shape[1], row_weights_R)
        out_RD = torch.empty_like(rows_RD)
        scratch = _scratch(windows, gate_XI)
        w1_EDI, w3_EDI, w2_EID = (w.transpose(1, 2).unbind(0) for w in (w1_EID, w3_EID, w2_EDI))
        tensors = (*_split(windows, gate_XI, up_XI, weights_X1), _one_memory(windows, gate_XI))
        for window, gate_WI, up_WI, weights_W1, hidden_WI in zip(windows, *tensors, strict=True):
            expert = window.expert
            rows_WD = window.read(rows_RD)
            torch.mm(rows_WD, w1_EDI[expert], out=gate_WI)
            torch.mm(rows_WD, w3_EDI[expert], out=up_WI)
            scratch.forward(gate_WI, up_WI, weights_W1, hidden_WI)
            out_WD = window.target(out_RD)
            torch.mm(hidden_WI, w2_EID[expert], out=out_WD)
            window.keep(out_WD, out_RD)
        ctx.windows, ctx.later = windows, later
        ctx.weights = (w1_EID, w3_EID, w2_EDI)  # the parameters: what was saved may come back without `grad`
        ctx.save_for_backward(rows_RD, w1_EID, w3_EID, w2_EDI, gate_XI, up_XI, weights_X1)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, w1_EID, w3_EID, w2_EDI, gate_XI, up_XI, weights_X1 = ctx.saved_tensors
        rows_RD = rows_RD.detach()  # as above
        windows: list[_Window] = ctx.windows
        put_off = ctx.later(*ctx.weights)
        dout_RD = grads[0].contiguous()
        drows_RD, dweights_R = torch.empty_like(rows_RD), weights_X1.new_empty(len(rows_RD))
        dws = None if put_off else _weight_gradients(windows, w1_EID, w3_EID, w2_EDI)
        kept: list[_Factors] = []
        results = _one_memory if dws else _own_memory
        scratch = _scratch(windows, gate_XI)
        tensors = (
            *_split(windows, gate_XI, up_XI, weights_X1),
            *(results(windows, gate_XI) for _ in range(3)),
        )
        for window, gate_WI, up_WI, weights_W1, hidden_WI, dgate_WI, dup_WI in zip(
            windows, *tensors, strict=True
        ):
            expert = window.expert
            rows_WD, dout_WD = window.read(rows_RD), window.read(dout_RD)
            torch.mm(dout_WD, w2_EDI[expert], out=dgate_WI)  # the gradient of the weighted SwiGLU output
            dweights_W = scratch.weighted_backward(
                gate_WI, up_WI, weights_W1, dgate_WI, dgate_WI, dup_WI, hidden_WI
            )
            dweights_R[window.start : window.start + window.count] = dweights_W[: window.count]
            factors = _Factors(expert, rows_WD, dout_WD, hidden_WI, dgate_WI, dup_WI)
            if dws is None:
                kept.append(factors)
            else:
                factors.multiply(*(dw_EXX[expert] for dw_EXX in dws))
            drows_WD = window.target(drows_RD)
            torch.mm(dgate_WI, w1_EID[expert], out=drows_WD)
            torch.addmm(drows_WD, dup_WI, w3_EID[expert], out=drows_WD)
            window.keep(drows_WD, drows_RD)
        if put_off is not None:
            put_off(partial(_add_products, kept, rows_RD.dtype))
        return drows_RD, *(dws or (None, None, None)), dweights_R, None, None


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


def _own_memory(windows: list[_Window], like_XI: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor [W, I] for each window."""
    return _split(windows, torch.empty_like(like_XI))[0]


def _one_memory(windows: list[_Window], like_XI: Tensor) -> tuple[Tensor, ...]:
    """Return the same for tensors of which one exists at a time: all in the memory of the largest window."""
    memory_PI = like_XI.new_empty(_largest(windows), like_XI.shape[1])
    return tuple(memory_PI[: window.size] for window in windows)


def _scratch(windows: list[_Window], like_XI: Tensor) -> SwiGLUScratch:
    """Return FP32 scratch as large as the largest window."""
    return SwiGLUScratch(_largest(windows), like_XI.shape[1], dtype=wide_type(like_XI))


def _largest(windows: list[_Window]) -> int:
    return max((window.size for window in windows), default=0)


def _weight_gradients(windows: list[_Window], *weights: Tensor) -> list[Tensor]:
    """Return tensors for the gradients of stacked weights, zero where an expert has no rows."""
    empty = sorted(set(range(len(weights[0]))) - {window.expert for window in windows})
    grads = [torch.empty_like(weight) for weight in weights]
    for grad in grads:
        grad[empty] = 0
    return grads
