"""The experts' feed-forward against a plain loop over experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import reference
from model.kernels.grouped_gemm import expert_ffn
from tests.model.kernels.compare import check_against_reference

WIDTH, INNER = 24, 16


def problem(counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    experts, rows = len(counts), sum(counts)
    shapes = [(rows, WIDTH), (experts, INNER, WIDTH), (experts, INNER, WIDTH), (experts, WIDTH, INNER)]
    tensors = [torch.randn(shape, generator=generator).mul(0.3).to(dtype) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [*tensors, torch.rand(rows, generator=generator).to(wide)]


def check(counts: list[int], dtype: torch.dtype) -> None:
    def kernel(rows: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, row_weights: Tensor) -> Tensor:
        return expert_ffn(rows, w1, w3, w2, counts, row_weights)

    def plain(rows: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, row_weights: Tensor) -> Tensor:
        return reference.expert_ffn(rows, w1, w3, w2, counts, row_weights)

    check_against_reference(kernel, plain, problem(counts, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "counts", [[70, 3, 128, 40], [0, 64, 0, 1], [5], [0, 0, 200], [200, 0, 0], [64, 64], [1] * 9]
)
def test_matches_the_reference(counts: list[int], dtype: torch.dtype):
    check(counts, dtype)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any))
def test_any_counts(counts: list[int]):
    check(counts, torch.float32)


def test_no_rows_at_all():
    inputs = [x.requires_grad_() for x in problem([0, 0], torch.float32)]
    out = expert_ffn(*inputs[:4], [0, 0], inputs[4])
    assert out.shape == (0, WIDTH)
    out.sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert not x.grad.any()


def test_experts_without_rows_get_zero_gradients():
    inputs = [x.requires_grad_() for x in problem([9, 0, 4], torch.float32)]
    expert_ffn(*inputs[:4], [9, 0, 4], inputs[4]).square().sum().backward()
    for weight in inputs[1:4]:
        assert weight.grad is not None
        assert not weight.grad[1].any()
        assert weight.grad[0].any()
        assert weight.grad[2].any()


def test_rows_do_not_see_each_other():
    """A huge row in one expert's window changes nothing elsewhere, weight gradients of others included."""
    counts = [10, 10]
    inputs = problem(counts, torch.float32)
    grads = []
    for huge in (0.0, 1e4):
        tensors = [x.clone() for x in inputs]
        tensors[0][12] += huge  # expert 1's, inside the window of expert 0
        tensors = [x.requires_grad_() for x in tensors]
        expert_ffn(*tensors[:4], counts, tensors[4]).sum().backward()
        grads.append(tensors[1].grad)
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_the_swiglu_output_is_not_kept():
    rows = 256
    inputs = [x.requires_grad_() for x in problem([rows], torch.float32)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        expert_ffn(*inputs[:4], [rows], inputs[4])
    own = {x.data_ptr() for x in inputs}
    kept = sum(x.numel() for x in saved if x.data_ptr() not in own)
    assert kept == 2 * rows * INNER + rows  # gate, up and one weight per row
