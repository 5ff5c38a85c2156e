"""Transformer Engine at the seams of the layers: te.Linear and te.GroupedLinear for the maps that are FP8.

The same maps as under the other FP8 backends (model/fp8.py), with the scales of `precision.fp8_scales`:

* on Hopper the recipe Float8BlockScaling: E4M3, 1 × 128 tiles and 128 × 128 blocks, FP32 or power-of-two
  scales for each kind of operand;
* on Blackwell MXFP8BlockScaling: E4M3, one power of two for each 32 values.

Where it departs from DeepSeek-V3 and from the other backends: the activations' operand of a weight gradient
is quantised from BF16 rather than turned from kept codes; SwiGLU's output is rounded to BF16 before it is
quantised, and gate and up are kept in BF16.

Legend: T tokens, D input and O output width, R routed rows, X the same with padding, E experts,
I intermediate.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backends.te_module import TeModule
from model.block import Block
from model.config import Fp8Scales, PrecisionConfig
from model.experts import Experts
from model.fp8 import Fp8Policy
from model.kernels.fp8 import BLOCK
from model.kernels.fp8_experts import Padding
from model.kernels.grouped_gemm import Later, now
from model.linear import Linear
from model.weight_gradients import WeightGradients

BLACKWELL = (10, 0)


class TeWeights:
    """The codes of all weights, which Transformer Engine's modules keep."""

    def __init__(self) -> None:
        self._modules: list[TeModule] = []

    def add(self, *modules: TeModule) -> None:
        """Have modules forget with the others."""
        self._modules += modules

    def forget(self) -> None:
        """Drop all codes; to be called whenever weights have changed."""
        for module in self._modules:
            module.forget()


def install_te(
    model: nn.Module, config: PrecisionConfig, weight_gradients: WeightGradients | None = None
) -> TeWeights:
    """Let every product inside the blocks of `model`, which is on its GPU, be one of Transformer Engine's.

    `weight_gradients` may put theirs off. Returns who forgets the codes of the weights.
    """
    later: Later = weight_gradients.later if weight_gradients else now
    policy, weights = Fp8Policy(config), TeWeights()
    everywhere = config.fp8_scales is Fp8Scales.power_of_two
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        for name, module in block.named_modules():
            if isinstance(module, Linear):
                scales = policy.linear_scales(name)
                used = recipe(x=scales.x, weight=scales.others, grad=scales.others)
                gemm = TeLinear(module.weight, used, later)
                module.gemm = gemm
                weights.add(gemm.module)
            elif isinstance(module, Experts):
                feed_forward = TeExperts(module, everywhere=everywhere, later=later)
                module.feed_forward = feed_forward
                weights.add(*feed_forward.modules)
    return weights


def recipe(*, x: bool, weight: bool, grad: bool) -> Any:
    """Return the recipe of this GPU; flags: whether scales of these operands are powers of two.

    They always are on Blackwell, where other wishes are refused beforehand.
    """
    recipes = import_module("transformer_engine.common.recipe")
    if torch.cuda.get_device_capability() >= BLACKWELL:
        return recipes.MXFP8BlockScaling()
    block_scaling = recipes.Float8BlockScaling()
    block_scaling.fp8_quant_fwd_inp = recipes.QParams(power_2_scale=x)
    block_scaling.fp8_quant_fwd_weight = recipes.QParams(power_2_scale=weight)
    block_scaling.fp8_quant_bwd_grad = recipes.QParams(power_2_scale=grad)
    return block_scaling


class TeLinear:
    """A `model.linear.Gemm`: x weightᵀ by te.Linear."""

    def __init__(self, weight_OD: Tensor, used: Any, later: Later) -> None:
        make = import_module("transformer_engine.pytorch").Linear
        num_outputs, width = weight_OD.shape
        self.module = TeModule(make(width, num_outputs, **_options(weight_OD)), used, later)

    def __call__(self, x: Tensor, weight: Tensor, /) -> Tensor:
        """Return x weightᵀ, [..., O], for x [..., D]; tokens are padded to a multiple of 128."""
        x_TD = x.reshape(-1, x.shape[-1])
        num_tokens = len(x_TD)
        if num_tokens == 0:
            return F.linear(x, weight)
        padded_TD = F.pad(x_TD, (0, 0, 0, -num_tokens % BLOCK)) if num_tokens % BLOCK else x_TD
        y_TO = self.module(weight, padded_TD)[:num_tokens]
        return y_TO.view(*x.shape[:-1], len(weight))


class TeExperts:
    """A `model.experts.GroupedFeedForward`: the maps of all routed experts by te.GroupedLinear.

    Rows are padded to a multiple of 128 for each expert.
    """

    def __init__(self, experts: Experts, *, everywhere: bool, later: Later) -> None:
        make = import_module("transformer_engine.pytorch").GroupedLinear
        up = recipe(x=True, weight=everywhere, grad=everywhere)
        down = recipe(x=everywhere, weight=everywhere, grad=True)

        def module(weight: Tensor, used: Any) -> TeModule:
            num_experts, num_outputs, width = weight.shape
            options = _options(weight) | {"use_grouped_tensor": False}
            return TeModule(make(num_experts, width, num_outputs, **options), used, later)

        self.modules = (module(experts.w1, up), module(experts.w3, up), module(experts.w2, down))

    def __call__(
        self,
        rows_RD: Tensor,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        counts: list[int],
        row_weights_R: Tensor,
        /,
    ) -> Tensor:
        """Return the weighted expert output of each row, [R, D]; see `GroupedFeedForward`."""
        if not len(rows_RD):
            return rows_RD * row_weights_R[:, None].to(rows_RD.dtype)
        w1, w3, w2 = self.modules
        padding = Padding.of(counts, rows_RD.device)
        sizes_E = torch.tensor(padding.sizes)
        rows_XD = padding.add(rows_RD)
        gate_XI, up_XI = w1(w1_EID, rows_XD, sizes_E), w3(w3_EID, rows_XD, sizes_E)
        weights_X1 = padding.add(row_weights_R)[:, None]
        hidden_XI = (F.silu(gate_XI.float()) * up_XI.float() * weights_X1).to(rows_RD.dtype)
        return padding.remove(w2(w2_EDI, hidden_XI, sizes_E))


def _options(weight: Tensor) -> dict[str, Any]:
    """Return how modules are made: without memory of their own, gradients added in place and on demand."""
    return {
        "bias": False,
        "params_dtype": weight.dtype,
        "device": "meta",
        "fuse_wgrad_accumulation": True,
        "delay_wgrad_compute": True,
    }
