"""A module of Transformer Engine around a weight that stays ours.

Names, initial values, flat buffers, checkpoints and exports know one parameter, whatever multiplies by it.
The module therefore owns nothing: its weights are aliases, parameters over the same memory that nobody else
sees, and their gradients go to the memory of ours by way of `main_grad`, where Transformer Engine adds
products to FP32 numbers without rounding them first. Autograd is told that our weight has no gradient here.

Three of its conventions are relied on, by which this file stands or falls:

* `fuse_wgrad_accumulation` adds to `main_grad`, unless `is_first_microbatch` is true: then it overwrites.
  Microbatches may finish in any order, so it is always false, which also lets the module keep the codes of
  its weights. They are dropped where ours are: by `forget`, whenever weights have changed.
* `delay_wgrad_compute` queues what a backward pass leaves to multiply; `backward_dw` multiplies the oldest.
  Whether that is due at once is for `WeightGradients` to say, which is asked when the gradient of the
  module's input has been computed.
* Block-scaling recipes have no state, so running a forward pass again changes nothing.

Transformer Engine 2.20 was read for this, not run: it needs a GPU (docs/fp8.md).

Legend: O output and D input width, E experts.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.grouped_gemm import Later
from model.weight_gradients import gradient


class TeModule:
    """Runs a te.Linear or te.GroupedLinear on a weight of ours."""

    def __init__(self, module: Any, recipe: Any, later: Later) -> None:
        self._autocast: Any = import_module("transformer_engine.pytorch").autocast
        self._module, self._recipe, self._later = module, recipe, later

    def __call__(self, weight: Tensor, x: Tensor, *arguments: Tensor) -> Tensor:
        """Return the module's output for x [..., D]; `weight` [O, D], or [E, O, D] of a grouped module."""
        self._bind(weight)
        watched: Any = _AfterBackward.apply(x, weight, self)
        with self._autocast(enabled=True, recipe=self._recipe):
            return self._module(watched, *arguments, is_first_microbatch=False)

    def forget(self) -> None:
        """Drop the codes of the weights."""
        self._module._fp8_workspaces.clear()

    def multiply(self, weight: Tensor) -> None:
        """Add the weight gradient that a backward pass has queued, or put it off."""
        put_off = self._later(weight)
        if put_off is None:
            self._module.backward_dw()
        else:
            put_off(lambda *_: self._module.backward_dw())  # it knows where to add

    def _bind(self, weight: Tensor) -> None:
        """Let the module's weights and their gradients be the memory of ours, wherever it is now."""
        names = ["weight"] if weight.dim() == 2 else [f"weight{expert}" for expert in range(len(weight))]
        stacked = weight.detach().view(len(names), *weight.shape[-2:])
        for name, matrix_OD in zip(names, stacked, strict=True):
            alias: Tensor = getattr(self._module, name)
            same = alias.device == matrix_OD.device and alias.data_ptr() == matrix_OD.data_ptr()
            if not same or alias.requires_grad is not weight.requires_grad:
                alias = nn.Parameter(matrix_OD, requires_grad=weight.requires_grad)
                self._module.register_parameter(name, alias)
        if weight.requires_grad and torch.is_grad_enabled():
            grads = gradient(weight).view_as(stacked)
            for name, grad_OD in zip(names, grads, strict=True):
                getattr(self._module, name).main_grad = grad_OD


class _AfterBackward(torch.autograd.Function):
    """Passes x through; in the backward pass it is reached when the module behind it has queued its products.

    That the weight is an input makes it so also where x itself needs no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: TeModule) -> Tensor:
        ctx.weight, ctx.module = weight, module
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.needs_input_grad[1]:
            ctx.module.multiply(ctx.weight)
        return grads[0], None, None
