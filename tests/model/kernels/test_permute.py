"""Rows to experts and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import blocks, reference
from model.kernels.permute import combine, permute, sort_by_expert
from tests.model.kernels.compare import check_against_reference


def choices(tokens: int, top_k: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 6), st.integers(6, 12))
def test_order_is_sorted_stable_and_invertible(tokens: int, top_k: int, experts: int):
    indices = choices(tokens, top_k, experts)
    order = sort_by_expert(indices)
    keys = [(int(indices.flatten()[c]), int(c)) for c in order.choice_R]
    assert keys == sorted(keys)
    assert torch.equal(order.choice_R[order.row_TA].flatten(), torch.arange(tokens * top_k))
    assert torch.equal(order.token_R[order.row_TA], torch.arange(tokens)[:, None].expand(-1, top_k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block_elements", [1 << 16, 50])
def test_both_directions_match_the_reference(
    dtype: torch.dtype, block_elements: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    order = sort_by_expert(choices(23, 4, 8))
    x = torch.randn(23, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.randn(92, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_against_reference(lambda x: permute(x, order), lambda x: reference.permute(x, order.token_R), [x])
    check_against_reference(
        lambda rows: combine(rows, order), lambda rows: reference.combine(rows, order.row_TA), [rows]
    )


def test_sums_are_fp32():
    """1 + 8 * 2^-9 in BF16 steps would stay 1; summed in FP32 and rounded once it does not."""
    order = sort_by_expert(torch.arange(9)[None])
    rows = torch.full((9, 4), 2.0**-9, dtype=torch.bfloat16)
    rows[0] = 1
    assert torch.equal(combine(rows, order), torch.full((1, 4), 1 + 2.0**-6, dtype=torch.bfloat16))
