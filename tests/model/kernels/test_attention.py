"""Blocked causal attention against the plain one."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels import attention, reference
from model.kernels.attention import causal_attention
from tests.model.kernels.compare import check_against_reference


def heads(seed: int, batch: int, length: int, num_heads: int, widths: tuple[int, int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, num_heads, width) for width in (widths[0], widths[0], widths[1])]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [1, 64, 129, 300])
def test_matches_the_reference(dtype: torch.dtype, length: int):
    inputs = heads(0, 2, length, 3, (24, 16), dtype)
    scale = 24**-0.5
    check_against_reference(
        partial(causal_attention, scale=scale), partial(reference.causal_attention, scale=scale), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_blocks_and_groups(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "MIN_BLOCK_ROWS", 16)
    monkeypatch.setattr(attention, "MAX_BLOCK_ROWS", 16)
    monkeypatch.setattr(attention, "GROUP_BYTES", 16 * 200 * 4 * 2)
    check_against_reference(
        partial(causal_attention, scale=0.3),
        partial(reference.causal_attention, scale=0.3),
        heads(1, 2, 200, 3, (8, 12), dtype),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_any_shape(batch: int, length: int, num_heads: int, key_width: int, value_width: int):
    inputs = heads(length, batch, length, num_heads, (key_width, value_width), torch.float32)
    check_against_reference(
        partial(causal_attention, scale=0.5), partial(reference.causal_attention, scale=0.5), inputs
    )


def test_large_scores_do_not_overflow():
    q, k, v = heads(2, 1, 40, 2, (8, 8), torch.float32)
    out = causal_attention(q * 1e4, k * 1e4, v, scale=1.0)
    assert out.isfinite().all()


def test_the_future_is_not_seen():
    q, k, v = heads(3, 1, 140, 2, (8, 8), torch.float32)
    before = causal_attention(q, k, v, scale=1.0)
    k[:, 100:], v[:, 100:] = 50.0, -50.0
    after = causal_attention(q, k, v, scale=1.0)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


def test_keeps_only_its_inputs_for_the_backward_pass():
    inputs = [x.requires_grad_() for x in heads(4, 1, 256, 2, (8, 8), torch.float32)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_attention(*inputs, scale=1.0)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs}
