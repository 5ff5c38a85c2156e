"""FP8 products at the seams of the layers: DeepSeek-V3's mixed precision (arXiv 2412.19437, section 3.3).

What is FP8: the three products (output, input gradient, weight gradient) of every linear map inside a block:
attention's projections, dense networks, shared and routed experts, and those of MTP's blocks. What is not, as
in the report: embedding, head, gate, norms, the attention core. MTP's `eh_proj` lies outside its block and
stays as well, as it does in the released FP8 weights.

    y  = x8 w8^T          x in 1 x 128 tiles, w in 128 x 128 blocks
    dx = dy8 w8           dy in 1 x 128 tiles
    dw = dy8^T x8         both in 128 x 1 tiles, x from the codes that were kept; the result is FP32

Codes are made once: those of a weight for all microbatches of a step, until `Fp8Weights.forget`; those of an
activation for all maps that take the same tensor. Only codes are kept for the backward pass, never x.

Legend: T tokens, D input width, O output width, R routed rows, E experts, I expert intermediate.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from model.block import Block
from model.config import Fp8Scales, PrecisionConfig
from model.experts import Experts
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, Quantized, quantize, requantize
from model.kernels.fp8_experts import ExpertScales, fp8_expert_ffn
from model.kernels.fp8_gemm import block_scaled_mm
from model.kernels.grouped_gemm import Later, now
from model.linear import Linear
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

    def __init__(self) -> None:
        self._codes = WeakTensorKeyDictionary()

    def codes(self, weight: Tensor, *, power_of_two: bool) -> Quantized:
        """Return the codes of a weight [..., O, D] in 128 x 128 blocks."""
        found = self._codes.get(weight)
        if found is None or found.power_of_two is not power_of_two:
            found = self._codes[weight] = quantize(weight.detach(), SQUARE, power_of_two=power_of_two)
        return found

    def forget(self) -> None:
        """Drop all codes."""
        self._codes.clear()


class _Inputs:
    """Codes of activations that several maps take, as long as the tensor itself is in use."""

    def __init__(self) -> None:
        self._codes = WeakTensorKeyDictionary()

    def codes(self, x: Tensor, *, power_of_two: bool) -> Quantized:
        """Return the codes of x [..., D] as those of a matrix [T, D], in 1 x 128 tiles."""
        made: tuple[int, Quantized] | None = self._codes.get(x)
        if made is None or made[0] != x._version or made[1].power_of_two is not power_of_two:
            x_TD = x.detach().reshape(-1, x.shape[-1])
            made = self._codes[x] = (x._version, quantize(x_TD, ROW_TILE, power_of_two=power_of_two))
        return made[1]


class Fp8Policy:
    """Which products are FP8, and with which scales; the codes of the weights are its own.

    Under `Fp8Scales.deepseek` scales are powers of two where the report has them: for the input of the output
    projection of attention, and for the two tensors of the routed experts that cross devices (section 3.3.3).
    """

    def __init__(self, config: PrecisionConfig) -> None:
        everywhere = config.fp8_scales is Fp8Scales.power_of_two
        self.weights = Fp8Weights()
        self._inputs = _Inputs()
        self._linear = LinearScales(x=everywhere, others=everywhere)
        self._attention_output = LinearScales(x=True, others=everywhere)
        self._experts = ExpertScales(rows=True, output_grad=True, others=everywhere)

    def linear_scales(self, name: str) -> LinearScales:
        """Return the scales of the linear map with this name inside its block."""
        return self._attention_output if name == "attn.wo" else self._linear

    def linear(self, x: Tensor, weight: Tensor, /, *, scales: LinearScales, later: Later = now) -> Tensor:
        """Return x weight^T in the type of x; x [..., D], weight [O, D]."""
        x_codes = self._inputs.codes(x, power_of_two=scales.x)
        weight_codes = self.weights.codes(weight, power_of_two=scales.others)
        out: Any = _Linear.apply(x, weight, x_codes, weight_codes, later)
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
            weight_codes=codes,
            scales=self._experts,
            later=later,
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
            elif isinstance(module, Experts):
                module.feed_forward = partial(policy.experts, later=later)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OD: Tensor, x_TD: Quantized, codes_OD: Quantized, later: Later
    ) -> Tensor:
        ctx.save_for_backward(x_TD.codes, x_TD.scales)
        ctx.weight, ctx.later = weight_OD, later  # the parameter: what was saved may come back without `grad`
        ctx.codes, ctx.power_of_two = codes_OD, x_TD.power_of_two
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return block_scaled_mm(x_TD, codes_OD, dtype=x.dtype).view(*x.shape[:-1], len(weight_OD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        codes_OD: Quantized = ctx.codes
        kept_TD, scales = ctx.saved_tensors
        x_TD = Quantized(kept_TD, scales, ROW_TILE, ctx.power_of_two)
        dout_TO = grads[0].reshape(-1, grads[0].shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            by_row_TO = quantize(dout_TO, ROW_TILE, power_of_two=codes_OD.power_of_two)
            dx = block_scaled_mm(by_row_TO, codes_OD.T, dtype=ctx.dtype).view(ctx.shape)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        by_column_TO = quantize(dout_TO, COLUMN_TILE, power_of_two=codes_OD.power_of_two)
        put_off = ctx.later(ctx.weight)
        if put_off is None:
            return dx, _weight_gradient(by_column_TO, x_TD), None, None, None
        put_off(lambda grad_OD: grad_OD.add_(_weight_gradient(by_column_TO, x_TD).to(grad_OD.dtype)))
        return dx, None, None, None, None


def _weight_gradient(dout_TO: Quantized, x_TD: Quantized) -> Tensor:
    """Return dout^T x, FP32 [O, D]; the tiles of x are turned first."""
    return block_scaled_mm(dout_TO.T, requantize(x_TD, COLUMN_TILE).T, dtype=torch.float32)
