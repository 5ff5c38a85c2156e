"""Maps with explicit quantisation, the truth for those of the FP8 policy, and a small model for them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backends.kernels import REFERENCE, Fp8Kernels
from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig, Recompute
from model.fp8 import Fp8Policy
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, BlockShape
from model.kernels.fp8_experts import ExpertScales
from model.transformer import Transformer
from tests.model.small import small
from tests.model.trainable import trainable

SIZES: dict[str, object] = {
    "hidden_size": 160,  # more than one tile, and a part of one
    "dense_intermediate_size": 144,
    "intermediate_size": 132,
    "num_mtp_layers": 1,
}


def make(compute: Compute, recompute: Recompute = Recompute.none, **changes: object) -> Transformer:
    """Return a model with matrices of more than one block, whose gradients exist."""
    return trainable(small(**SIZES | changes), compute, recompute)


def policy(scales: Fp8Scales, kernels: Fp8Kernels = REFERENCE) -> Fp8Policy:
    return Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference, fp8_scales=scales), kernels=kernels)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake(x: Tensor, block: BlockShape, *, power_of_two: bool) -> Tensor:
    """Return x quantised and decoded, FP32: written out once more, for matrices, without caches or tricks."""
    rows, columns = x.shape
    high, wide = block
    padded = F.pad(x.float(), (0, -columns % wide, 0, -rows % high))
    tiles = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    amax = tiles.abs().amax((1, 3), keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / 448)
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
    decoded = (tiles / scales).to(torch.float8_e4m3fn).float() * scales
    return decoded.view(padded.shape)[:rows, :columns]


class PlainLinear(torch.autograd.Function):
    """The three products of a linear map on quantised operands, FP32, for a matrix x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, x_two: bool, others_two: bool) -> Tensor:
        x8 = fake(x, ROW_TILE, power_of_two=x_two)
        w8 = fake(w, SQUARE, power_of_two=others_two)
        ctx.save_for_backward(x8, w8)
        ctx.two = x_two, others_two
        return (x8 @ w8.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x8, w8), (x_two, others_two) = grads, ctx.saved_tensors, ctx.two
        dx = fake(dy, ROW_TILE, power_of_two=others_two) @ w8
        turned = fake(x8, COLUMN_TILE, power_of_two=x_two)
        return dx.to(dy.dtype), fake(dy, COLUMN_TILE, power_of_two=others_two).T @ turned, None, None


def plain_linear(x: Tensor, w: Tensor, /, *, x_two: bool, others_two: bool) -> Tensor:
    y: Any = PlainLinear.apply(x.reshape(-1, x.shape[-1]), w, x_two, others_two)
    return y.view(*x.shape[:-1], len(w))


class PlainGated(torch.autograd.Function):
    """SwiGLU and the map after it, for matrices: its weight gradient is from the codes of gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, w: Tensor, x_two: bool, others_two: bool) -> Tensor:
        row = partial(fake, block=ROW_TILE, power_of_two=x_two)
        w8 = fake(w, SQUARE, power_of_two=others_two)
        ctx.save_for_backward(row(gate), row(up), w8)
        ctx.two = x_two, others_two
        return (row(F.silu(gate.float()) * up.float()) @ w8.T).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (gate, up, w8), (x_two, others_two) = grads, ctx.saved_tensors, ctx.two
        dhidden = (fake(dy, ROW_TILE, power_of_two=others_two) @ w8).to(dy.dtype).float()
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (gate, up)]
            hidden = F.silu(leaves[0]) * leaves[1]
        dgate, dup = (g.to(dy.dtype) for g in torch.autograd.grad(hidden, leaves, dhidden))
        turned = fake(hidden.detach(), COLUMN_TILE, power_of_two=x_two)
        return dgate, dup, fake(dy, COLUMN_TILE, power_of_two=others_two).T @ turned, None, None


def plain_gated(up: Tensor, gate: Tensor, w: Tensor, /, *, x_two: bool, others_two: bool) -> Tensor:
    y: Any = PlainGated.apply(*(t.reshape(-1, t.shape[-1]) for t in (gate, up)), w, x_two, others_two)
    return y.view(*gate.shape[:-1], len(w))


class PlainExpert(torch.autograd.Function):
    """One expert's network and its gradients, FP32, with the scales of ExpertScales as in `two`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, two: ExpertScales
    ) -> Tensor:
        row = partial(fake, block=ROW_TILE, power_of_two=two.others)
        x8 = fake(x, ROW_TILE, power_of_two=True)
        w1, w3, w2 = (fake(w, SQUARE, power_of_two=two.others) for w in (w1, w3, w2))
        gate, up = (x8 @ w1.T).to(x.dtype), (x8 @ w3.T).to(x.dtype)
        hidden = F.silu(gate.float()) * up.float() * weights[:, None]
        ctx.save_for_backward(x8, w1, w3, w2, row(gate), row(up), weights)
        ctx.two = two
        return (row(hidden) @ w2.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x8, w1, w3, w2, gate, up, weights), two = grads, ctx.saved_tensors, ctx.two
        row = partial(fake, block=ROW_TILE, power_of_two=two.others)
        column = partial(fake, block=COLUMN_TILE, power_of_two=two.others)
        dy8 = fake(dy, ROW_TILE, power_of_two=two.output_grad)
        dhidden = (dy8 @ w2).to(dy.dtype).float()
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (gate, up, weights)]
            hidden = F.silu(leaves[0]) * leaves[1] * leaves[2][:, None]
        dgate, dup, dweights = torch.autograd.grad(hidden, leaves, dhidden)
        dx = (row(dgate) @ w1).to(dy.dtype) + (row(dup) @ w3).to(dy.dtype)
        turned = fake(x8, COLUMN_TILE, power_of_two=True)
        dw2 = fake(dy8, COLUMN_TILE, power_of_two=two.output_grad).T @ column(hidden.detach())
        return dx, column(dgate).T @ turned, column(dup).T @ turned, dw2, dweights, None


def plain_experts(
    rows: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    counts: list[int],
    weights: Tensor,
    /,
    *,
    two: ExpertScales,
) -> Tensor:
    parts = zip(rows.split(counts), w1, w3, w2, weights.split(counts), strict=True)
    outputs: list[Any] = [PlainExpert.apply(*part, two) for part in parts if len(part[0])]
    return torch.cat(outputs)


def scales_of(scales: Fp8Scales) -> tuple[dict[str, bool], dict[str, bool], ExpertScales]:
    """Return for most linear maps, for attention's output and for experts which scales are powers of two."""
    all_two = scales is Fp8Scales.power_of_two
    usual = {"x_two": all_two, "others_two": all_two}
    return usual, usual | {"x_two": True}, ExpertScales(output_grad=True, others=all_two)
