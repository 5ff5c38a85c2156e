"""Weight gradients now or later: the halves of a backward pass that zero-bubble pipelines run apart.

The backward pass of y = x W^T is two products of about equal cost: dx = dy W, for which the layer before
(and the pipeline stage before) waits, and dW = dy^T x, for which nobody waits before the optimizer. A
schedule that keeps the second for the moments when there is nothing else to do fills its bubbles
(arXiv 2401.10241, section 2).

    gradients = WeightGradients()
    install(model, gradients)
    with gradients.put_off() as work:
        loss.backward()         # gradients of inputs, and of weights that are no matrices: norms, the gate
    ...                         # the stage before goes on
    for product in work:
        product()               # adds to `weight.grad`

Autograd's graph is used once and as it is: a product that is put off keeps x and dy, and autograd is told
that the weight has no gradient. Activations that are recomputed (model/recompute.py) are so before, with the
gradients of inputs, and never twice. Gradients are added in the type and with the rounding that autograd
would have used, so they are bit-identical where the order of microbatches is the same.

Legend: T tokens, D input width, O output width, R routed rows, E experts, I expert intermediate.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.experts import Experts
from model.kernels.grouped_gemm import AddGradients, Later, expert_ffn
from model.linear import Linear

Work = Callable[[], None]


class WeightGradients:
    """Products whose weight gradients are put off while a schedule says so."""

    def __init__(self) -> None:
        self._work: list[Work] | None = None

    @contextmanager
    def put_off(self) -> Iterator[list[Work]]:
        """Make backward passes inside append to the list that is yielded, instead of multiplying.

        Each entry is to be called once, in any order and at any time; it adds to `grad` of its weights, in
        place, and frees what it held. Several lists may wait at the same time, one for each microbatch.
        """
        before, self._work = self._work, []
        try:
            yield self._work
        finally:
            self._work = before

    def later(self, *weights: Tensor) -> Callable[[AddGradients], None] | None:
        """Return what takes the function that adds the weights' gradients, or None if they are due now.

        They are always due where autograd needs them, for weights that are computed from others.
        """
        if self._work is None or not all(weight.is_leaf and weight.requires_grad for weight in weights):
            return None
        return partial(_append, self._work, weights)

    def linear(self, x: Tensor, weight: Tensor, /) -> Tensor:
        """Return x weight^T as a `model.linear.Gemm`: x [..., D], weight [O, D]."""
        out: Any = _Linear.apply(x, weight, self.later)
        return out

    def expert_ffn(
        self,
        rows_RD: Tensor,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        counts: list[int],
        row_weights_R: Tensor,
        /,
    ) -> Tensor:
        """Return the output of the experts as a `model.experts.GroupedFeedForward`."""
        return expert_ffn(rows_RD, w1_EID, w3_EID, w2_EDI, counts, row_weights_R, later=self.later)


def install(model: nn.Module, gradients: WeightGradients) -> None:
    """Let every plain matrix product of the model go through `gradients`.

    A module whose product was replaced already, such as by a low-precision one, keeps that.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.gemm is F.linear:
            module.gemm = gradients.linear
        if isinstance(module, Experts) and module.feed_forward is expert_ffn:
            module.feed_forward = gradients.expert_ffn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, later: Later) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        ctx.weight, ctx.later = weight_OD, later  # the parameter: what was saved may come back without `grad`
        return F.linear(x, weight_OD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OD = ctx.saved_tensors
        num_outputs, width = weight_OD.shape
        # detached: what waits for the weight's gradient must not keep the graph that x came from
        dout_TO, x_TD = grads[0].reshape(-1, num_outputs), x.detach().reshape(-1, width)
        dx = (dout_TO @ weight_OD).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        put_off = ctx.later(ctx.weight)
        if put_off is None:
            return dx, dout_TO.T @ x_TD, None
        put_off(lambda grad_OD: grad_OD.add_(dout_TO.T @ x_TD))
        return dx, None, None


class _Product:
    """Adds gradients to those of its weights, once, and forgets what it was made of."""

    def __init__(self, weights: tuple[Tensor, ...], add: AddGradients) -> None:
        self._weights = weights
        self._add: AddGradients | None = add

    def __call__(self) -> None:
        add, self._add = self._add, None
        if add is None:
            raise RuntimeError("a weight gradient that was put off is to be added once, not twice")
        with torch.no_grad():
            add(*map(gradient, self._weights))


def _append(work: list[Work], weights: tuple[Tensor, ...], add: AddGradients) -> None:
    work.append(_Product(weights, add))


def gradient(weight: Tensor) -> Tensor:
    """Return weight.grad, first made of zeros in the type in which it is accumulated."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype or weight.dtype)
    return weight.grad
