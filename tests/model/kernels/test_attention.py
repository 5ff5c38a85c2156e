"""Blocked causal attention against the plain one."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import attention_by_position
from model.kernels import attention, reference
from model.kernels.attention import causal_attention
from tests.model.kernels.compare import TOLERANCE, check_against_reference, relative_error


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


def later_queries(first: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = heads(first, 2, first + length, 3, (24, 16), dtype)
    return [q[:, first:], k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("first", "length"), [(1, 1), (40, 129), (150, 3), (64, 300)])
def test_queries_of_the_last_part_of_a_sequence(dtype: torch.dtype, first: int, length: int):
    check_against_reference(
        partial(causal_attention, scale=0.3, first=first),
        partial(reference.causal_attention, scale=0.3, first=first),
        later_queries(first, length, dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_queries_in_many_blocks_and_groups(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "MIN_BLOCK_ROWS", 16)
    monkeypatch.setattr(attention, "MAX_BLOCK_ROWS", 16)
    monkeypatch.setattr(attention, "GROUP_BYTES", 16 * 250 * 4 * 2)
    check_against_reference(
        partial(causal_attention, scale=0.3, first=50),
        partial(reference.causal_attention, scale=0.3, first=50),
        later_queries(50, 200, dtype),
    )


def test_later_queries_agree_with_explicit_positions():
    def by_position(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        places = {
            "q_positions_BS": torch.arange(33, 77).expand(2, -1),
            "k_positions_BM": torch.arange(77).expand(2, -1),
        }
        return attention_by_position(q, k, v, scale=0.3, **places)

    inputs = later_queries(33, 44, torch.float32)
    grad = torch.randn(2, 44, 3, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (partial(causal_attention, scale=0.3, first=33), by_position):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine.detach(), theirs.detach()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("first", [0, 20])
def test_the_path_of_accelerators(first: int):
    """It runs on a CPU as well, through torch's plain attention."""
    check_against_reference(
        partial(attention._torch_attention, scale=0.3),
        partial(reference.causal_attention, scale=0.3, first=first),
        later_queries(first, 30, torch.float32),
    )


def test_queries_and_keys_must_end_together():
    q, k, v = heads(3, 1, 20, 2, (8, 8), torch.float32)
    with pytest.raises(ValueError, match="5 queries from position 10 on need 15 keys, not 20"):
        causal_attention(q[:, :5], k, v, scale=1.0, first=10)


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
