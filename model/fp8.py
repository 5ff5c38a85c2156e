"""FP8 products at the seams of the layers: DeepSeek-V3's mixed precision (arXiv 2412.19437, section 3.3).

What is FP8: the three products (output, input gradient, weight gradient) of every linear map inside a block:
attention's projections, dense networks, shared and routed experts, and those of MTP's blocks. What is not, as
in the report: embedding, head, gate, norms, the attention core. MTP's `eh_proj` lies outside its block and
stays as well, as it does in the released FP8 weights.

    y  = x8 w8^T          x in 1 x 128 tiles, w in 128 x 128 blocks
    dx = dy8 w8           dy in 1 x 128 tiles
    dw = dy8^T x8         both in 128 x 1 tiles, x from the codes that were kept; the result is FP32

Codes are made once: those of a weight for all microbatches of a step, until `Fp8Weights.forget`; those of an
activation for all maps that take the same tensor.

Only codes are kept for the backward pass, never x, and where the backward pass recomputes x, such as a
norm's output, not even these. Of a SwiGLU network, gate and up are kept as codes, and from them the input of
its down projection is computed again (section 3.3.3), whatever is recomputed elsewhere.

Legend: T tokens, D input width, O output width, R routed rows, E experts, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from model.backends.kernels import REFERENCE, Fp8Kernels
from model.block import Block
from model.config import Fp8Scales, PrecisionConfig
from model.experts import Experts
from model.feedforward import FeedForward
from model.fp8_watch import Fp8Watch, Sample, TensorClass
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, Quantized
from model.kernels.fp8_experts import ExpertScales, fp8_expert_ffn, swiglu_backward
from model.kernels.grouped_gemm import Later, now
from model.linear import Linear
from model.recompute import derived
from model.weight_gradients import WeightGradients


@dataclass(frozen=True, kw_only=True)
class LinearScales:
    """Which scales of a linear map's operands are powers of two."""

    x: bool
    others: bool


class Fp8Weights:
    """Codes of weights, made at first use and kept until they are forgotten.

    A weight that changes does not say so (an optimizer writes to the memory that it is a view of), hence
    `forget` is to be called whenever weights have changed: after an optimizer step, after loading.
    """

    def __init__(self, watch: Fp8Watch, kernels: Fp8Kernels = REFERENCE) -> None:
        self._codes = WeakTensorKeyDictionary()
        self._kernels = kernels
        self._watch = watch

    def codes(self, weight: Tensor, *, power_of_two: bool) -> Quantized:
        """Return the codes of a weight [..., O, D] in 128 x 128 blocks."""
        found = self._codes.get(weight)
        if found is None or found.power_of_two is not power_of_two:
            found = self._kernels.quantize(weight.detach(), SQUARE, power_of_two=power_of_two)
            self._codes[weight] = found
            self._watch.see_weight(weight, found)
        return found

    def forget(self) -> None:
        """Drop all codes."""
        self._codes.clear()


class _Inputs:
    """Codes of activations that several maps take, as long as the tensor itself is in use.

    They follow their tensor: what is recomputed has codes that are.
    """

    def __init__(self, kernels: Fp8Kernels) -> None:
        self._kernels = kernels
        self._codes = WeakTensorKeyDictionary()

    def codes(self, x: Tensor, *, power_of_two: bool) -> Quantized:
        """Return the codes of x [..., D] as those of a matrix [T, D], in 1 x 128 tiles."""
        made: tuple[int, Quantized] | None = self._codes.get(x)
        if made is None or made[0] != x._version or made[1].power_of_two is not power_of_two:
            make = partial(_codes_and_scales, kernels=self._kernels, power_of_two=power_of_two)
            codes, scales = derived(make, x.detach())
            made = self._codes[x] = (x._version, Quantized(codes, scales, ROW_TILE, power_of_two))
        return made[1]


def _codes_and_scales(x: Tensor, *, kernels: Fp8Kernels, power_of_two: bool) -> tuple[Tensor, Tensor]:
    quantized = kernels.quantize(x.reshape(-1, x.shape[-1]), ROW_TILE, power_of_two=power_of_two)
    return quantized.codes, quantized.scales


class Fp8Policy:
    """Which products are FP8, and with which scales; the codes of the weights are its own.

    Under `Fp8Scales.deepseek` scales are powers of two where the report has them: for the input of the output
    projection of attention, and for the two tensors of the routed experts that cross devices (section 3.3.3).

    kernels: who computes; watch: what counts the losses of quantisation, in the steps in which it is active.
    """

    def __init__(
        self, config: PrecisionConfig, watch: Fp8Watch | None = None, *, kernels: Fp8Kernels = REFERENCE
    ) -> None:
        everywhere = config.fp8_scales is Fp8Scales.power_of_two
        self.watch = watch or Fp8Watch()
        self.weights = Fp8Weights(self.watch, kernels)
        self._kernels = kernels
        self._inputs = _Inputs(kernels)
        self._linear = LinearScales(x=everywhere, others=everywhere)
        self._attention_output = LinearScales(x=True, others=everywhere)
        self._experts = ExpertScales(output_grad=True, others=everywhere)

    def linear_scales(self, name: str) -> LinearScales:
        """Return the scales of the linear map with this name inside its block."""
        return self._attention_output if name == "attn.wo" else self._linear

    def linear(self, x: Tensor, weight: Tensor, /, *, scales: LinearScales, later: Later = now) -> Tensor:
        """Return x weight^T in the type of x; x [..., D], weight [O, D]."""
        x_codes = self._inputs.codes(x, power_of_two=scales.x)
        weight_codes = self.weights.codes(weight, power_of_two=scales.others)
        sample = self.watch.sample(TensorClass.ACTIVATIONS, x, x_codes)
        out: Any = _Linear.apply(x, weight, x_codes, weight_codes, self._kernels, later, self.watch, sample)
        return out

    def gated_linear(
        self, up: Tensor, gate: Tensor, weight: Tensor, /, *, scales: LinearScales, later: Later = now
    ) -> Tensor:
        """Return (silu(gate) * up) weight^T in the type of gate; up and gate [..., I], weight [D, I].

        The product of SwiGLU goes from FP32 straight to codes, in the forward pass from gate and up as they
        are, for the weight gradient from their codes. scales.x: of gate and up as well.
        """
        weight_codes = self.weights.codes(weight, power_of_two=scales.others)
        how = (scales.x, self._kernels, later, self.watch)
        out: Any = _GatedLinear.apply(gate, up, weight, weight_codes, *how)
        return out

    def experts(
        self,
        rows_RD: Tensor,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        counts: list[int],
        row_weights_R: Tensor,
        /,
        *,
        later: Later = now,
    ) -> Tensor:
        """Return the output of the routed experts; see `fp8_expert_ffn`."""

        def codes(weight: Tensor) -> Quantized:
            return self.weights.codes(weight, power_of_two=self._experts.others)

        return fp8_expert_ffn(
            rows_RD,
            w1_EID,
            w3_EID,
            w2_EDI,
            counts,
            row_weights_R,
            row_codes=self._inputs.codes(rows_RD, power_of_two=True),
            weight_codes=codes,
            scales=self._experts,
            kernels=self._kernels,
            later=later,
            watch=self.watch,
        )


def install_fp8(model: nn.Module, policy: Fp8Policy, weight_gradients: WeightGradients | None = None) -> None:
    """Let every product inside the blocks of `model` be FP8; `weight_gradients` may put theirs off."""
    later: Later = weight_gradients.later if weight_gradients else now
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                module.gemm = partial(policy.linear, scales=policy.linear_scales(name), later=later)
            elif isinstance(module, FeedForward):
                scales = policy.linear_scales(f"{name}.w2")
                module.gated_gemm = partial(policy.gated_linear, scales=scales, later=later)
            elif isinstance(module, Experts):
                module.feed_forward = partial(policy.experts, later=later)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OD: Tensor,
        x_TD: Quantized,
        codes_OD: Quantized,
        kernels: Fp8Kernels,
        later: Later,
        watch: Fp8Watch,
        sample: Sample | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TD.codes, x_TD.scales)
        ctx.weight, ctx.later = weight_OD, later  # the parameter: what was saved may come back without `grad`
        ctx.codes, ctx.power_of_two, ctx.kernels = codes_OD, x_TD.power_of_two, kernels
        ctx.shape, ctx.dtype, ctx.watch, ctx.sample = x.shape, x.dtype, watch, sample
        y_TO = kernels.block_scaled_mm(x_TD, codes_OD, dtype=x.dtype)
        return y_TO.view(*x.shape[:-1], len(weight_OD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes_OD: Quantized = ctx.codes
        kernels: Fp8Kernels = ctx.kernels
        ctx.watch.count(ctx.sample)
        kept_TD, scales = ctx.saved_tensors
        x_TD = Quantized(kept_TD, scales, ROW_TILE, ctx.power_of_two)
        dout_TO = grads[0].reshape(-1, grads[0].shape[-1])
        by_row_TO, by_column_TO = kernels.quantize_both(dout_TO, power_of_two=codes_OD.power_of_two)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            ctx.watch.see(TensorClass.GRADIENTS, dout_TO, by_row_TO)
            dx = kernels.block_scaled_mm(by_row_TO, codes_OD.T, dtype=ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = _now_or_later(ctx, lambda: _outer(kernels, by_column_TO, kernels.requantize_columns(x_TD)))
        return dx, dw, None, None, None, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight_DI: Tensor,
        codes_DI: Quantized,
        x_two: bool,
        kernels: Fp8Kernels,
        later: Later,
        watch: Fp8Watch,
    ) -> Tensor:
        gate_TI, up_TI = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        hidden, *kept = kernels.swiglu_and_quantize(gate_TI, up_TI, None, power_of_two=x_two)
        ctx.save_for_backward(*chain.from_iterable((x.codes, x.scales) for x in kept))
        ctx.weight, ctx.later = weight_DI, later  # the parameter: what was saved may come back without `grad`
        ctx.codes, ctx.x_two, ctx.shape, ctx.dtype = codes_DI, x_two, gate.shape, gate.dtype
        ctx.kernels, ctx.watch = kernels, watch
        ctx.sample = watch.sample_swiglu(gate_TI, up_TI, None, hidden)
        y_TD = kernels.block_scaled_mm(hidden, codes_DI, dtype=gate.dtype)
        return y_TD.view(*gate.shape[:-1], len(weight_DI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes_DI: Quantized = ctx.codes
        kernels: Fp8Kernels = ctx.kernels
        kept = ctx.saved_tensors
        gate_TI, up_TI = (
            kernels.dequantize(Quantized(codes, steps, ROW_TILE, ctx.x_two))
            for codes, steps in zip(kept[::2], kept[1::2], strict=True)
        )
        dout_TD = grads[0].reshape(-1, grads[0].shape[-1])
        by_row_TD, by_column_TD = kernels.quantize_both(dout_TD, power_of_two=codes_DI.power_of_two)
        ctx.watch.count(ctx.sample)
        ctx.watch.see(TensorClass.GRADIENTS, dout_TD, by_row_TD)
        dhidden_TI = kernels.block_scaled_mm(by_row_TD, codes_DI.T, dtype=ctx.dtype).float()
        hidden_TI, dgate_TI, dup_TI, _ = swiglu_backward(gate_TI, up_TI, gate_TI.new_ones(1), dhidden_TI)
        dgate, dup = (x_TI.to(ctx.dtype).view(ctx.shape) for x_TI in (dgate_TI, dup_TI))
        if not ctx.needs_input_grad[2]:
            return dgate, dup, None, None, None, None, None, None
        turned_TI = kernels.quantize(hidden_TI, COLUMN_TILE, power_of_two=ctx.x_two)
        dweight = _now_or_later(ctx, lambda: _outer(kernels, by_column_TD, turned_TI))
        return dgate, dup, dweight, None, None, None, None, None


def _outer(kernels: Fp8Kernels, dout_TO: Quantized, x_TD: Quantized) -> Tensor:
    """Return dout^T x, FP32 [O, D], of tensors in 128 x 1 tiles."""
    return kernels.block_scaled_mm(dout_TO.T, x_TD.T, dtype=torch.float32)


def _now_or_later(ctx: Any, gradient: Callable[[], Tensor]) -> Tensor | None:
    """Return the gradient of ctx.weight, or None where ctx.later puts it off."""
    put_off = ctx.later(ctx.weight)
    if put_off is None:
        return gradient()
    put_off(lambda grad: grad.add_(gradient().to(grad.dtype)))
    return None
