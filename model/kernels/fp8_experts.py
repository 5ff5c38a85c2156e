"""The feed-forward of all routed experts in FP8, over rows sorted by expert (arXiv 2412.19437, 3.3.2, 3.3.3).

As `model.kernels.grouped_gemm.expert_ffn`, with all nine products block-scaled, and with what the report
keeps for the backward pass: rows, gate and up as FP8 codes. The SwiGLU output is computed again from the
codes of gate and up. It and the gradients of gate and up go from FP32 straight to codes.

The rows of each expert are followed by rows of zeros up to a multiple of 128. Tiles that run along the rows
then never reach from one expert into the next, everything between the products is one operation over the rows
of all experts, and the GEMM library sees few different shapes.

Legend: R routed rows, X the same with the zeros, D hidden, I intermediate, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.fp8 import BLOCK, COLUMN_TILE, ROW_TILE, Quantized, quantize, requantize
from model.kernels.fp8_gemm import grouped_block_scaled_mm, grouped_block_scaled_outer
from model.kernels.grouped_gemm import Later, now


@dataclass(frozen=True, kw_only=True)
class ExpertScales:
    """Which scales of the experts are powers of two.

    rows and output_grad: of what is exchanged between devices, the inputs of the up projections and the
    gradients of the down projection's output; others: of everything else.
    """

    rows: bool
    output_grad: bool
    others: bool


def fp8_expert_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    row_weights_R: Tensor,
    *,
    weight_codes: Callable[[Tensor], Quantized],
    scales: ExpertScales,
    later: Later = now,
) -> Tensor:
    """Return weight_r * (silu(x_r w1_e^T) * (x_r w3_e^T)) w2_e^T of each row r and its expert e, [R, D].

    Arguments as of `expert_ffn`; weight_codes returns the codes of a stack of weights in 128 x 128 blocks.
    Gradients of the weights are FP32, those of experts without rows zero.
    """
    codes = tuple(weight_codes(weight) for weight in (w1_EID, w3_EID, w2_EDI))
    out: Any = _ExpertFFN.apply(rows_RD, w1_EID, w3_EID, w2_EDI, row_weights_R, counts, codes, scales, later)
    return out


@dataclass(frozen=True)
class _Padding:
    """sizes: rows of each expert among X; place_R: where each row lies among them."""

    sizes: list[int]
    place_R: Tensor

    @staticmethod
    def of(counts: list[int], device: torch.device) -> "_Padding":
        """Return the padding of experts with these numbers of rows."""
        sizes = [-(-count // BLOCK) * BLOCK for count in counts]
        shifts = (a - b for a, b in zip(accumulate(sizes), accumulate(counts), strict=True))
        before = [0, *shifts][:-1]
        shift_R = torch.tensor(before).repeat_interleave(torch.tensor(counts))
        return _Padding(sizes, (torch.arange(sum(counts)) + shift_R).to(device))

    def add(self, rows_R: Tensor) -> Tensor:
        """Return the rows [R, ...] among zeros, [X, ...]."""
        return rows_R.new_zeros(sum(self.sizes), *rows_R.shape[1:]).index_copy_(0, self.place_R, rows_R)

    def remove(self, rows_X: Tensor) -> Tensor:
        """Return the rows [R, ...] of [X, ...]."""
        return rows_X.index_select(0, self.place_R)

    def pack(self, x_X: Quantized) -> tuple[Tensor, Tensor]:
        """Return codes as bytes and scales of the rows in R, to be kept for the backward pass."""
        return self.remove(x_X.codes.view(torch.uint8)), self.remove(x_X.scales)

    def unpack(self, codes_R: Tensor, scales_R: Tensor, *, power_of_two: bool) -> Quantized:
        """Return what was packed, among rows of zeros."""
        codes_X = self.add(codes_R).view(torch.float8_e4m3fn)
        return Quantized(codes_X, self.add(scales_R), ROW_TILE, power_of_two)


@dataclass(frozen=True)
class _Factors:
    """What the gradients of the weights are products of, as codes."""

    sizes: list[int]
    rows_XD: Quantized
    dout_XD: Quantized
    hidden_XI: Quantized
    dgate_XI: Quantized
    dup_XI: Quantized

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of w1, w3 and w2, FP32."""
        outer = partial(grouped_block_scaled_outer, sizes=self.sizes, dtype=torch.float32)
        rows_XD = requantize(self.rows_XD, COLUMN_TILE)
        return outer(self.dgate_XI, rows_XD), outer(self.dup_XI, rows_XD), outer(self.dout_XD, self.hidden_XI)

    def add_to(self, *grads_EXX: Tensor) -> None:
        """Add products to the gradients of w1, w3 and w2, rounded to their type first, as autograd does."""
        for grad_EXX, product_EXX in zip(grads_EXX, self.products(), strict=True):
            grad_EXX += product_EXX.to(grad_EXX.dtype)


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
        codes: tuple[Quantized, Quantized, Quantized],
        scales: ExpertScales,
        later: Later,
    ) -> Tensor:
        padding, dtype = _Padding.of(counts, rows_RD.device), rows_RD.dtype
        multiply = partial(grouped_block_scaled_mm, sizes=padding.sizes, dtype=dtype)
        rows_XD = quantize(padding.add(rows_RD), ROW_TILE, power_of_two=scales.rows)
        gate_XI, up_XI = multiply(rows_XD, codes[0]), multiply(rows_XD, codes[1])
        weights_X1 = padding.add(row_weights_R)[:, None]
        hidden_XI = F.silu(gate_XI.float()) * up_XI.float() * weights_X1
        out_XD = multiply(quantize(hidden_XI, ROW_TILE, power_of_two=scales.others), codes[2])
        kept = [rows_XD, *(quantize(x, ROW_TILE, power_of_two=scales.others) for x in (gate_XI, up_XI))]
        ctx.save_for_backward(row_weights_R, *chain.from_iterable(map(padding.pack, kept)))
        ctx.weights = (w1_EID, w3_EID, w2_EDI)  # the parameters: what was saved may come back without `grad`
        ctx.padding, ctx.codes, ctx.scales, ctx.later, ctx.dtype = padding, codes, scales, later, dtype
        return padding.remove(out_XD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_weights_R, *kept = ctx.saved_tensors
        padding, scales, (w1_EID, w3_EID, w2_EDI) = ctx.padding, ctx.scales, ctx.codes
        flags = (scales.rows, scales.others, scales.others)
        rows_XD, gate_XI, up_XI = (
            padding.unpack(codes, steps, power_of_two=flag)
            for codes, steps, flag in zip(kept[::2], kept[1::2], flags, strict=True)
        )
        multiply = partial(grouped_block_scaled_mm, sizes=padding.sizes, dtype=ctx.dtype)
        dout_XD = padding.add(grads[0])
        by_row, by_column = (
            partial(quantize, block=block, power_of_two=scales.others) for block in (ROW_TILE, COLUMN_TILE)
        )
        dhidden_XI = multiply(quantize(dout_XD, ROW_TILE, power_of_two=scales.output_grad), w2_EDI.T)
        hidden_XI, dgate_XI, dup_XI, dweights_X = _swiglu_backward(
            gate_XI.dequantize(),
            up_XI.dequantize(),
            padding.add(row_weights_R)[:, None],
            dhidden_XI.float(),
        )
        drows_XD = multiply(by_row(dgate_XI), w1_EID.T) + multiply(by_row(dup_XI), w3_EID.T)
        factors = _Factors(
            padding.sizes,
            rows_XD,
            quantize(dout_XD, COLUMN_TILE, power_of_two=scales.output_grad),
            *(by_column(x_XI) for x_XI in (hidden_XI, dgate_XI, dup_XI)),
        )
        put_off = ctx.later(*ctx.weights)
        if put_off is not None:
            put_off(factors.add_to)
        dws = (None, None, None) if put_off else factors.products()
        return padding.remove(drows_XD), *dws, padding.remove(dweights_X), None, None, None, None


def _swiglu_backward(
    gate_XI: Tensor, up_XI: Tensor, weights_X1: Tensor, dhidden_XI: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return silu(gate) * up * weights and the gradients of gate, up and weights [X]; all FP32."""
    sigmoid_XI = gate_XI.sigmoid()
    act_XI = gate_XI * sigmoid_XI
    product_XI = act_XI * up_XI
    dweights_X = (product_XI * dhidden_XI).sum(-1)
    dproduct_XI = dhidden_XI * weights_X1
    dact_XI = dproduct_XI * up_XI
    dgate_XI = dact_XI * sigmoid_XI * (1 + gate_XI * (1 - sigmoid_XI))
    return product_XI * weights_X1, dgate_XI, dproduct_XI * act_XI, dweights_X
