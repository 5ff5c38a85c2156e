"""The products of the FP8 policy, one map at a time, against explicit quantisation."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import Fp8Scales
from model.kernels import reference
from model.kernels.fp8 import ROW_TILE, SQUARE, quantize
from model.kernels.fp8_experts import ExpertScales, Padding, fp8_expert_ffn
from model.weight_gradients import WeightGradients
from tests.model.kernels.compare import relative_error
from tests.model.plain_fp8 import normal, plain_experts, plain_gated, plain_linear, policy, scales_of
from tests.model.small import relative


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("shape", [(2, 3, 130), (300, 256), (1, 5), (0, 8)])
def test_the_three_products_of_a_linear_map(scales: Fp8Scales, shape: tuple[int, ...]) -> None:
    """The explicit ones in FP32: bit for bit where the same GEMM runs, not with powers of two."""
    results = []
    fp8 = policy(scales)
    ours = partial(fp8.linear, scales=fp8.linear_scales("ffn.w1"))
    for function in (ours, partial(plain_linear, **scales_of(scales)[0])):
        x, w = normal(*shape).requires_grad_(), normal(140, shape[-1], seed=1).requires_grad_()
        y = function(x, w)
        y.backward(normal(*y.shape, seed=2))
        results.append((y, x.grad, w.grad))
    for ours_, plain in zip(*results, strict=True):
        assert relative_error(ours_, plain) < 1e-6
        assert scales is Fp8Scales.power_of_two or torch.equal(ours_, plain)


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("shape", [(2, 3, 130), (300, 256), (0, 8)])
def test_a_gated_map_keeps_codes_of_gate_and_up(scales: Fp8Scales, shape: tuple[int, ...]) -> None:
    results = []
    fp8 = policy(scales)
    ours = partial(fp8.gated_linear, scales=fp8.linear_scales("ffn.w2"))
    for function in (ours, partial(plain_gated, **scales_of(scales)[0])):
        gate, up, w = (
            normal(*s, seed=i).requires_grad_() for i, s in enumerate([shape, shape, (140, shape[-1])])
        )
        y = function(up, gate, w)
        y.backward(normal(*y.shape, seed=3))
        results.append((y, gate.grad, up.grad, w.grad))
    for ours_, plain in zip(*results, strict=True):
        assert relative_error(ours_, plain) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", Fp8Scales)
def test_half_precision_results_are_those_rounded_once(dtype: torch.dtype, scales: Fp8Scales) -> None:
    x, w = normal(64, 200).to(dtype).requires_grad_(), normal(140, 200, seed=1).to(dtype).requires_grad_()
    w.grad_dtype = torch.float32
    dy = normal(64, 140, seed=2).to(dtype)
    fp8 = policy(scales)
    y = fp8.linear(x, w, scales=fp8.linear_scales("ffn.w1"))
    y.backward(dy)
    x32, w32 = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    expected = plain_linear(x32, w32, **scales_of(scales)[0])
    expected.backward(dy.float())
    assert y.dtype == x.grad.dtype == dtype
    assert w.grad.dtype == torch.float32
    assert relative_error(y, expected) < 2**-8
    assert relative_error(x.grad, x32.grad) < 2**-8
    assert relative_error(w.grad, w32.grad) < 1e-6


def run_experts(function: Callable[..., Tensor], counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of rows, w1, w3, w2 and row weights."""
    num_rows = sum(counts)
    shapes = [(num_rows, 140), (4, 136, 140), (4, 136, 140), (4, 140, 136)]
    rows, *ws = leaves = [normal(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    for w in ws:
        w.grad_dtype = torch.float32
    weights = normal(num_rows, seed=9).sigmoid().requires_grad_()
    y = function(rows, *ws, counts, weights)
    y.backward(normal(*y.shape, seed=10).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in (*leaves, weights))]


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("counts", [[70, 0, 5, 130], [0, 0, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(scales: Fp8Scales, counts: list[int], dtype: torch.dtype) -> None:
    """Against each expert alone and unpadded; experts without rows get zero gradients."""
    expected = run_experts(partial(plain_experts, two=scales_of(scales)[2]), counts, dtype)
    for ours, plain in zip(run_experts(policy(scales).experts, counts, dtype), expected, strict=True):
        assert ours.dtype == plain.dtype
        assert relative(ours.float(), plain.float()) < (1e-5 if dtype == torch.float32 else 2e-3)


def test_experts_without_any_rows() -> None:
    output, drows, *dws, dweights = run_experts(policy(Fp8Scales.deepseek).experts, [0] * 4, torch.bfloat16)
    assert output.shape == drows.shape == (0, 140)
    assert dweights.shape == (0,)
    assert all(dw.dtype == torch.float32 and not dw.any() for dw in dws)


def test_experts_are_padded_with_no_more_rows_than_they_need() -> None:
    padding, rows = Padding.of([128, 0, 5, 256], torch.device("cpu")), normal(389, 3)
    assert padding.sizes == [128, 0, 128, 256]
    assert torch.equal(padding.add(rows)[:133], rows[:133])
    assert torch.equal(padding.remove(padding.add(rows)), rows)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_experts_are_the_elementwise_reference(power_of_two: bool) -> None:
    counts, two = [3, 0, 2], ExpertScales(output_grad=power_of_two, others=power_of_two)
    rows, weights = normal(5, 130), normal(5, seed=9).sigmoid()
    ws = [normal(*shape, seed=i) / 10 for i, shape in enumerate([(3, 20, 130), (3, 20, 130), (3, 130, 20)])]

    def codes(weight: Tensor) -> Any:
        return quantize(weight, SQUARE, power_of_two=power_of_two)

    row_codes = quantize(rows, ROW_TILE, power_of_two=power_of_two)
    ours = fp8_expert_ffn(rows, *ws, counts, weights, row_codes=row_codes, weight_codes=codes, scales=two)
    each = [tuple(codes(w[expert]) for w in ws) for expert in range(3)]
    assert relative_error(ours, reference.fp8_expert_ffn(rows, each, counts, weights)) < 1e-6


def test_gradients_in_bf16_are_rounded_as_autograd_rounds_them() -> None:
    """Each microbatch's by itself, before they are added."""
    results = []
    for put_off in (False, True):
        later, fp8 = WeightGradients(), policy(Fp8Scales.deepseek)
        shapes = [(140, 160), (2, 36, 160), (2, 36, 160), (2, 160, 36)]
        w, *ws = (nn.Parameter(normal(*shape, seed=i).bfloat16()) for i, shape in enumerate(shapes))
        for seed in range(2):
            x, row_weights = normal(9, 160, seed=seed).bfloat16(), torch.ones(9)
            y = fp8.linear(x, w, scales=fp8.linear_scales("ffn.w1"), later=later.later)
            z = fp8.experts(x, *ws, [4, 5], row_weights, later=later.later)
            with later.put_off() if put_off else nullcontext([]) as work:
                torch.autograd.backward([y, z], [normal(*out.shape, seed=7).bfloat16() for out in (y, z)])
            for product in work:
                product()
        results.append([weight.grad for weight in (w, *ws)])
    for now_, later_ in zip(*results, strict=True):
        assert now_.dtype == torch.bfloat16
        assert torch.equal(now_, later_)


def test_what_is_not_finite_stays_visible() -> None:
    fp8 = policy(Fp8Scales.deepseek)
    x, w = torch.ones(4, 256, requires_grad=True), torch.ones(8, 256, requires_grad=True)
    for bad in (torch.inf, torch.nan):
        broken = x.detach().clone()
        broken[1, 3] = bad
        y = fp8.linear(broken.requires_grad_(), w, scales=fp8.linear_scales("attn.wo"))
        assert y.isnan().any(-1).tolist() == [False, True, False, False]
        dy = torch.ones_like(y)
        dy[2, 0] = bad
        y.backward(dy)
        assert broken.grad.isnan().any(-1).tolist() == [False, False, True, False]
        assert w.grad[0].isnan().all()
