"""The fused cross-entropy against plain logits and torch's cross-entropy."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import cross_entropy, reference
from model.kernels.cross_entropy import linear_cross_entropy
from tests.distributed import run_ranks
from tests.model.kernels.compare import TOLERANCE, relative_error

D, V = 16, 37


def problem(tokens: int, dtype: torch.dtype, *, ignored: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[:ignored]] = -100
    weights = torch.rand(tokens, generator=generator) / 1000
    return [hidden, weight, labels, weights]


def check(tokens: int, dtype: torch.dtype, *, chunk: int, ignored: int = 0, factor: float = 1.0) -> None:
    hidden, weight, labels, weights = problem(tokens, dtype, ignored=ignored)
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss, token_loss = linear_cross_entropy(*mine, labels, weights, chunk_tokens=chunk)
    expected, expected_token_loss = reference.linear_cross_entropy(*exact, labels, weights.double())
    (loss * factor).backward()
    (expected * factor).backward()
    tolerance = TOLERANCE[dtype]
    assert relative_error(token_loss, expected_token_loss) <= tolerance
    assert relative_error(loss.detach(), expected.detach()) <= tolerance
    for x, y in zip(mine, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == dtype
        assert relative_error(x.grad, y.grad) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "chunk", "ignored"), [(50, 16, 7), (16, 16, 0), (5, 100, 5), (1, 1, 0)])
def test_matches_the_reference(dtype: torch.dtype, tokens: int, chunk: int, ignored: int):
    check(tokens, dtype, chunk=chunk, ignored=ignored)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 60), st.floats(-3, 3))
def test_any_chunking(tokens: int, chunk: int, ignored: int, factor: float):
    check(tokens, torch.float32, chunk=chunk, ignored=min(ignored, tokens), factor=factor)


def test_blocks_smaller_than_a_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "SOFTMAX_ELEMENTS", 3 * V)
    monkeypatch.setattr(cross_entropy, "ACCUMULATE_ROWS", 10)
    check(50, torch.float32, chunk=20, ignored=4)


def test_fp16_gradients_survive_tiny_token_weights():
    hidden, weight, labels, _ = problem(32, torch.float16)
    weights = torch.full((32,), 1e-9)
    parameter = nn.Parameter(weight)
    parameter.grad_dtype = torch.float32
    linear_cross_entropy(hidden, parameter, labels, weights)[0].backward()
    exact = weight.double().requires_grad_()
    reference.linear_cross_entropy(hidden.double(), exact, labels, weights.double())[0].backward()
    assert parameter.grad is not None
    assert exact.grad is not None
    assert parameter.grad.dtype == torch.float32
    assert relative_error(parameter.grad, exact.grad) < 3e-3


def test_large_logits_do_not_overflow():
    hidden, weight, labels, weights = problem(20, torch.float32)
    loss, token_loss = linear_cross_entropy(hidden * 1e4, weight, labels, weights)
    assert loss.isfinite()
    assert token_loss.isfinite().all()


def test_the_backward_pass_may_run_twice():
    """Schedules that split the backward pass run this node once for its input and once for its weight."""
    hidden, weight, labels, weights = problem(20, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, weights)[0] * 3
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    (dhidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert torch.equal(once[0], dhidden)
    assert torch.equal(once[1], dweight)


class Rows:
    """A part of the vocabulary, its statistics combined over the processes of a test."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.collectives: list[tuple[str, tuple[int, ...]]] = []

    def max(self, x: Tensor) -> Tensor:
        self.collectives.append(("max", tuple(x.shape)))
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def sum(self, x: Tensor) -> Tensor:
        self.collectives.append(("sum", tuple(x.shape)))
        dist.all_reduce(x)
        return x


SPLITS = {2: [(20, 17), (36, 1)], 3: [(13, 12, 12), (1, 30, 6)]}
"""Rows of the vocabulary on each process."""


def split_against_whole(
    rank: int, sizes: tuple[int, ...], dtype: torch.dtype, *, tokens: int, ignored: int
) -> None:
    hidden, weight, labels, weights = problem(tokens, dtype, ignored=ignored)
    rows = Rows(sum(sizes[:rank]))
    mine = [hidden.clone().requires_grad_(), weight.split(sizes)[rank].clone().requires_grad_()]
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    options = {"chunk_tokens": 16}
    loss, token_loss = linear_cross_entropy(*mine, labels, weights, vocabulary=rows, **options)
    expected, expected_token_loss = linear_cross_entropy(*whole, labels, weights, **options)
    (loss * 0.5).backward()
    (expected * 0.5).backward()
    assert mine[0].grad is not None
    assert whole[1].grad is not None
    dhidden = mine[0].grad.float()
    dist.all_reduce(dhidden)
    tolerance = TOLERANCE[dtype]
    assert relative_error(loss.detach(), expected.detach()) <= 1e-6
    assert relative_error(token_loss, expected_token_loss) <= 1e-6
    assert mine[0].grad.dtype == dtype
    assert relative_error(dhidden, whole[0].grad) <= tolerance
    assert relative_error(mine[1].grad, whole[1].grad.split(sizes)[rank]) <= tolerance
    chunks = [min(16, tokens - start) for start in range(0, tokens, 16)]
    assert rows.collectives == [call for n in chunks for call in (("max", (n,)), ("sum", (2, n)))]


def split_vocabulary_cases(rank: int, world_size: int) -> None:
    for sizes in SPLITS[world_size]:
        for dtype in (torch.float32, torch.bfloat16):
            split_against_whole(rank, sizes, dtype, tokens=50, ignored=7)
            split_against_whole(rank, sizes, dtype, tokens=5, ignored=5)
    cross_entropy.SOFTMAX_ELEMENTS = 3 * max(sizes)
    split_against_whole(rank, sizes, torch.float32, tokens=50, ignored=7)
    # without gradients: the same collectives, the same loss, one product
    hidden, weight, labels, weights = problem(20, torch.float32)
    rows = Rows(sum(sizes[:rank]))
    with torch.no_grad():
        part = weight.split(sizes)[rank]
        loss, _ = linear_cross_entropy(hidden * 1e4, part, labels, weights, vocabulary=rows)
        expected, _ = linear_cross_entropy(hidden * 1e4, weight, labels, weights)
    assert loss.isfinite()
    assert relative_error(loss, expected) <= 1e-6
    assert [call[0] for call in rows.collectives] == ["max", "sum"]


@pytest.mark.parametrize("world_size", SPLITS)
def test_a_vocabulary_spread_over_devices(world_size: int):
    run_ranks(world_size, split_vocabulary_cases, world_size)


def test_without_gradients_none_are_computed():
    hidden, weight, labels, weights = problem(20, torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        calls = _count_gemms(lambda: linear_cross_entropy(hidden, weight, labels, weights))
    assert calls == 1
    assert _count_gemms(lambda: linear_cross_entropy(hidden, weight, labels, weights)) == 2


def test_the_logits_never_exist_whole():
    """No tensor is larger than a chunk of logits, and all chunks share one buffer."""
    tokens, chunk = 512, 32
    hidden, weight, labels, weights = problem(tokens, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    tensors = _tensors(lambda: linear_cross_entropy(hidden, weight, labels, weights, chunk_tokens=chunk))
    assert max(x.numel() for x in tensors) == max(chunk * V, tokens * D)
    logits = [x for x in tensors if x.shape == (chunk, V) and x.dtype == torch.bfloat16]
    assert len({x.data_ptr() for x in logits}) == 1


def _count_gemms(function: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")


def _tensors(function: Callable[[], object]) -> list[Tensor]:
    """Return every tensor that an operation yields; kept alive, so that no address is used twice."""
    tensors: list[Tensor] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors.extend(x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    with Recorder():
        function()
    return tensors
