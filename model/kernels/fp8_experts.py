"""The feed-forward of all routed experts in FP8, over rows sorted by expert (arXiv 2412.19437, 3.3.2, 3.3.3).

As `model.kernels.grouped_gemm.expert_ffn`, with all nine products block-scaled, and with what the report
keeps for the backward pass: rows, gate and up as FP8 codes. The SwiGLU output is computed again from the
codes of gate and up. It and the gradients of gate and up go from FP32 straight to codes. The codes of the
rows are the caller's: where the rows can be computed again, so can they.

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
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.backends.kernels import REFERENCE, Fp8Kernels
from model.fp8_watch import Fp8Watch, TensorClass
from model.kernels.fp8 import BLOCK, COLUMN_TILE, ROW_TILE, Quantized
from model.kernels.grouped_gemm import Later, now


@dataclass(frozen=True, kw_only=True)
class ExpertScales:
    """Which scales of the experts are powers of two, those of the rows aside.

    output_grad: of the gradients of the down projection's output, which are exchanged between devices;
    others: of everything else.
    """

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
    row_codes: Quantized,
    weight_codes: Callable[[Tensor], Quantized],
    scales: ExpertScales,
    kernels: Fp8Kernels = REFERENCE,
    later: Later = now,
    watch: Fp8Watch | None = None,
) -> Tensor:
    """Return weight_r * (silu(x_r w1_e^T) * (x_r w3_e^T)) w2_e^T of each row r and its expert e, [R, D].

    Arguments as of `expert_ffn`; row_codes: the rows in 1 x 128 tiles; weight_codes returns the codes of a
    stack of weights in 128 x 128 blocks; watch: what counts the losses of quantisation.
    Gradients of the weights are FP32, those of experts without rows zero.
    """
    codes = tuple(weight_codes(weight) for weight in (w1_EID, w3_EID, w2_EDI))
    weights, how = (w1_EID, w3_EID, w2_EDI), (scales, kernels, later, watch or Fp8Watch())
    out: Any = _ExpertFFN.apply(rows_RD, *weights, row_weights_R, counts, row_codes, codes, *how)
    return out


@dataclass(frozen=True)
class Padding:
    """Rows of zeros behind those of each expert, up to a multiple of 128.

    sizes: rows of each expert among X; place_R: where each row lies among them.
    """

    sizes: list[int]
    place_R: Tensor

    @staticmethod
    def of(counts: list[int], device: torch.device) -> "Padding":
        """Return the padding of experts with these numbers of rows."""
        sizes = [-(-count // BLOCK) * BLOCK for count in counts]
        shifts = (a - b for a, b in zip(accumulate(sizes), accumulate(counts), strict=True))
        before = [0, *shifts][:-1]
        shift_R = torch.tensor(before).repeat_interleave(torch.tensor(counts), output_size=sum(counts))
        return Padding(sizes, (torch.arange(sum(counts)) + shift_R).to(device))

    def add(self, rows_R: Tensor) -> Tensor:
        """Return the rows [R, ...] among zeros, [X, ...]."""
        return rows_R.new_zeros(sum(self.sizes), *rows_R.shape[1:]).index_copy_(0, self.place_R, rows_R)

    def remove(self, rows_X: Tensor) -> Tensor:
        """Return the rows [R, ...] of [X, ...]."""
        return rows_X.index_select(0, self.place_R)

    def add_codes(self, x_R: Quantized) -> Quantized:
        """Return the same of rows in 1 x 128 tiles."""
        codes_X = self.add(x_R.codes.view(torch.uint8)).view(torch.float8_e4m3fn)
        return Quantized(codes_X, self.add(x_R.scales), ROW_TILE, x_R.power_of_two)

    def remove_codes(self, x_X: Quantized) -> Quantized:
        """Return the rows in R of rows in 1 x 128 tiles."""
        codes_R = self.remove(x_X.codes.view(torch.uint8)).view(torch.float8_e4m3fn)
        return Quantized(codes_R, self.remove(x_X.scales), ROW_TILE, x_X.power_of_two)


@dataclass(frozen=True)
class _Factors:
    """What the gradients of the weights are products of, as codes."""

    sizes: list[int]
    kernels: Fp8Kernels
    rows_XD: Quantized
    dout_XD: Quantized
    hidden_XI: Quantized
    dgate_XI: Quantized
    dup_XI: Quantized

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of w1, w3 and w2, FP32."""
        outer = partial(self.kernels.grouped_block_scaled_outer, sizes=self.sizes, dtype=torch.float32)
        rows_XD = self.kernels.requantize_columns(self.rows_XD)
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
        row_codes_RD: Quantized,
        codes: tuple[Quantized, Quantized, Quantized],
        scales: ExpertScales,
        kernels: Fp8Kernels,
        later: Later,
        watch: Fp8Watch,
    ) -> Tensor:
        padding, dtype = Padding.of(counts, rows_RD.device), rows_RD.dtype
        multiply = partial(kernels.grouped_block_scaled_mm, sizes=padding.sizes, dtype=dtype)
        rows_XD = padding.add_codes(row_codes_RD)
        gate_XI, up_XI = multiply(rows_XD, codes[0]), multiply(rows_XD, codes[1])
        weights_X = padding.add(row_weights_R)
        hidden, gate, up = kernels.swiglu_and_quantize(gate_XI, up_XI, weights_X, power_of_two=scales.others)
        out_XD = multiply(hidden, codes[2])
        kept = (row_codes_RD, padding.remove_codes(gate), padding.remove_codes(up))
        ctx.save_for_backward(row_weights_R, *chain.from_iterable((x.codes, x.scales) for x in kept))
        ctx.power_of_two = [x.power_of_two for x in kept]
        ctx.weights = (w1_EID, w3_EID, w2_EDI)  # the parameters: what was saved may come back without `grad`
        ctx.counts, ctx.codes, ctx.scales, ctx.dtype = counts, codes, scales, dtype
        ctx.kernels, ctx.later, ctx.watch = kernels, later, watch
        ctx.samples = (
            watch.sample_arrived(TensorClass.EXPERT_ROWS, rows_RD, row_codes_RD),
            watch.sample_swiglu(gate_XI, up_XI, weights_X, hidden),
        )
        return padding.remove(out_XD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_weights_R, *kept = ctx.saved_tensors
        scales, (w1_EID, w3_EID, w2_EDI) = ctx.scales, ctx.codes
        padding = Padding.of(ctx.counts, row_weights_R.device)  # made again: eight bytes a row
        kernels: Fp8Kernels = ctx.kernels
        rows_XD, gate_XI, up_XI = (
            padding.add_codes(Quantized(codes, steps, ROW_TILE, flag))
            for codes, steps, flag in zip(kept[::2], kept[1::2], ctx.power_of_two, strict=True)
        )
        multiply = partial(kernels.grouped_block_scaled_mm, sizes=padding.sizes, dtype=ctx.dtype)
        # what arrived from other devices was codes by row: columns are of these wherever the experts live
        padded_XD = padding.add(grads[0])
        dout_XD = kernels.quantize(padded_XD, ROW_TILE, power_of_two=scales.output_grad)
        dhidden_XI = multiply(dout_XD, w2_EDI.T)
        hidden_XI, dgate_XI, dup_XI, dweights_X = swiglu_backward(
            kernels.dequantize(gate_XI),
            kernels.dequantize(up_XI),
            padding.add(row_weights_R)[:, None],
            dhidden_XI.float(),
        )
        dgate, dup = (kernels.quantize_both(x_XI, power_of_two=scales.others) for x_XI in (dgate_XI, dup_XI))
        arrived = ctx.watch.sample_arrived(TensorClass.GRADIENTS, padded_XD, dout_XD)
        ctx.watch.count(*ctx.samples, arrived)
        for x_XI, (codes_XI, _) in ((dgate_XI, dgate), (dup_XI, dup)):
            ctx.watch.see(TensorClass.GRADIENTS, x_XI, codes_XI)
        drows_XD = multiply(dgate[0], w1_EID.T) + multiply(dup[0], w3_EID.T)
        factors = _Factors(
            padding.sizes,
            kernels,
            rows_XD,
            kernels.requantize_columns(dout_XD),
            kernels.quantize(hidden_XI, COLUMN_TILE, power_of_two=scales.others),
            dgate[1],
            dup[1],
        )
        put_off = ctx.later(*ctx.weights)
        if put_off is not None:
            put_off(factors.add_to)
        dws = (None, None, None) if put_off else factors.products()
        return padding.remove(drows_XD), *dws, padding.remove(dweights_X), *([None] * 7)


def swiglu_backward(
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
