"""Weight gradients put off: the same to the last bit, whatever is recomputed and whenever they are run."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Compute, Recompute
from model.experts import Experts
from model.kernels import grouped_gemm
from model.kernels.grouped_gemm import expert_ffn
from model.linear import Linear
from model.recompute import region, saving
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model.live_bytes import LiveBytes
from tests.model.small import small
from tests.model.trainable import loss_of, trainable

IMMEDIATE = ("norm", "gate", "embed")
"""Parts of the names of weights that are no matrix products of the model's compute type."""


def make(recompute: Recompute, compute: Compute) -> Transformer:
    return trainable(small(num_mtp_layers=1), compute, recompute)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
@pytest.mark.parametrize("recompute", Recompute)
def test_gradients_are_bit_identical(recompute: Recompute, compute: Compute):
    plain, now, later = (make(recompute, compute) for _ in range(3))
    for model in (plain, now):
        if model is now:
            install(model, WeightGradients())
        for microbatch in range(2):
            loss_of(model, microbatch).backward()
    weight_gradients = WeightGradients()
    install(later, weight_gradients)
    pointers = {name: gradient.data_ptr() for name, gradient in gradients(later).items()}
    waiting = []
    for microbatch in range(2):
        loss = loss_of(later, microbatch)
        with weight_gradients.put_off() as work:
            loss.backward()
        waiting.append(work)
    for name, gradient in gradients(later).items():
        assert gradient.any() == any(part in name for part in IMMEDIATE), name
    for work in reversed(waiting):
        assert len(work) == len(waiting[0]) > 10
        for product in reversed(work):
            product()
    expected = gradients(plain)
    assert all(gradient.any() for name, gradient in expected.items() if name != "head.weight")
    for model in (now, later):
        assert gradients(model).keys() == expected.keys()
        for name, gradient in gradients(model).items():
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected[name]), name
    assert {name: gradient.data_ptr() for name, gradient in gradients(later).items()} == pointers


def test_gradients_that_do_not_exist_are_made_in_their_own_type():
    """As autograd makes them: FP32 where `grad_dtype` says so, otherwise in the type of the weight."""
    for grad_dtype in (torch.float32, torch.bfloat16):
        made = []
        for put_off in (False, True):
            linear = Linear(8, 4, dtype=torch.bfloat16)
            torch.nn.init.constant_(linear.weight, 0.25)
            linear.weight.grad_dtype = grad_dtype
            weight_gradients = WeightGradients()
            install(linear, weight_gradients)
            y = linear(torch.arange(16).view(2, 8).bfloat16())
            if put_off:
                with weight_gradients.put_off() as work:
                    y.sum().backward()
                assert linear.weight.grad is None
                work[0]()
            else:
                y.sum().backward()
            made.append(linear.weight.grad)
        assert made[0].dtype == made[1].dtype == grad_dtype
        assert torch.equal(*made)


def test_only_what_autograd_does_not_need_is_put_off():
    weight_gradients = WeightGradients()
    x, base = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    frozen = nn.Parameter(torch.randn(4, 8), requires_grad=False)
    with weight_gradients.put_off() as work:
        weight_gradients.linear(x, 2 * base).sum().backward()
        weight_gradients.linear(x, frozen).sum().backward()
    assert work == []
    assert base.grad is not None
    assert frozen.grad is None
    weight_gradients.linear(x, base).sum().backward()  # outside, nothing is put off
    assert work == []


def test_inputs_without_gradient_and_of_any_rank():
    for shape in [(8,), (3, 8), (2, 3, 8), (0, 8)]:
        x, weight = torch.randn(shape), torch.randn(4, 8, requires_grad=True)
        out = WeightGradients().linear(x, weight)
        grad = torch.randn(out.shape)
        (mine,) = torch.autograd.grad(out, weight, grad)
        (theirs,) = torch.autograd.grad(F.linear(x, weight), weight, grad)
        torch.testing.assert_close(mine, theirs)


def test_a_product_is_added_once():
    weight_gradients = WeightGradients()
    weight = torch.randn(4, 8, requires_grad=True)
    with weight_gradients.put_off() as work:
        weight_gradients.linear(torch.randn(3, 8), weight).sum().backward()
    work[0]()
    with pytest.raises(RuntimeError, match="once, not twice"):
        work[0]()


def test_recipes_are_unpacked_once_and_before():
    """The region runs in the forward pass and with the gradients of inputs, never for those of weights."""
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x

    weight_gradients = WeightGradients()
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with saving(Recompute.deepseek):
        y = weight_gradients.linear(region(Recompute.deepseek, double, x), weight)
    with weight_gradients.put_off() as work:
        y.sum().backward()
    assert calls == 2
    work[0]()
    assert calls == 2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * x).sum(0).expand(4, 8))


@pytest.mark.parametrize("recompute", Recompute)
def test_what_was_put_off_is_freed(recompute: Recompute):
    """Product by product while they run, and all of it also without the garbage collector."""
    model, weight_gradients = make(recompute, Compute.fp32), WeightGradients()
    install(model, weight_gradients)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            loss = loss_of(model, 0)
            with weight_gradients.put_off() as work:
                loss.backward()
        del loss
        live.forget(*model.parameters(), *gradients(model).values(), *model.buffers())
        held = [live.num_bytes]
        for product in work:
            product()
            held.append(live.num_bytes)
        assert held[0] > held[len(held) // 2] > held[-1] == 0
        assert held == sorted(held, reverse=True)
    finally:
        gc.enable()


def graph_behind(x: Tensor) -> weakref.ref[Any]:
    """Return a reference to something that lives as long as the graph that x came from."""
    node: Any = x.grad_fn
    token = node.metadata["token"] = torch.empty(0)
    return weakref.ref(token)


def test_products_that_wait_keep_no_graph():
    """It may hold gradients that were collected on the way, in a pipeline more than the factors are."""
    weight_gradients, counts = WeightGradients(), [64, 0, 70]
    leaf, weights_R = torch.randn(134, 8, requires_grad=True), torch.rand(134)
    w, w1, w3, w2 = (torch.randn(*s, requires_grad=True) for s in [(6, 8), (3, 4, 8), (3, 4, 8), (3, 8, 4)])
    for function in (
        lambda x: weight_gradients.linear(x, w),
        lambda x: weight_gradients.expert_ffn(x, w1, w3, w2, counts, weights_R),
    ):
        x = 2 * leaf
        graph = graph_behind(x)
        with weight_gradients.put_off() as work:
            function(x).sum().backward()
        del x
        assert work
        assert graph() is None


def test_products_that_were_replaced_are_kept():
    def gemm(x: Tensor, weight: Tensor, /) -> Tensor:
        return F.linear(x, weight)

    model, weight_gradients = make(Recompute.none, Compute.fp32), WeightGradients()
    first = next(module for module in model.modules() if isinstance(module, Experts))
    model.head.gemm, first.feed_forward = gemm, WeightGradients().expert_ffn
    replaced = first.feed_forward
    install(model, weight_gradients)
    assert model.head.gemm is gemm
    assert first.feed_forward is replaced
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.head:
            assert module.gemm == weight_gradients.linear
        if isinstance(module, Experts) and module is not first:
            assert module.feed_forward == weight_gradients.expert_ffn


def accelerated(
    rows: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, counts: list[int], row_weights: Tensor
) -> Callable[[WeightGradients], Tensor]:
    """Return the experts as they run on an accelerator; grouped_mm exists on the CPU as well."""
    return lambda weight_gradients: grouped_gemm._grouped_mm_ffn(
        rows, w1, w3, w2, counts, row_weights, weight_gradients.later
    )


def on_cpu(
    rows: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, counts: list[int], row_weights: Tensor
) -> Callable[[WeightGradients], Tensor]:
    return lambda weight_gradients: weight_gradients.expert_ffn(rows, w1, w3, w2, counts, row_weights)


@pytest.mark.parametrize("experts", [on_cpu, accelerated])
@pytest.mark.parametrize("counts", [[70, 0, 5, 64], [0, 0, 0, 3]])
def test_experts_on_either_path(
    experts: Callable[..., Callable[[WeightGradients], Tensor]], counts: list[int]
):
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(counts), 24), (4, 16, 24), (4, 16, 24), (4, 24, 16), (sum(counts),)]
    rows, w1, w3, w2, row_weights = leaves = [
        torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes
    ]
    grad = torch.randn(sum(counts), 24, generator=generator)
    expected = torch.autograd.grad(expert_ffn(rows, w1, w3, w2, counts, row_weights), leaves, grad)
    weight_gradients = WeightGradients()
    function = experts(rows, w1, w3, w2, counts, row_weights)
    immediate = torch.autograd.grad(function(weight_gradients), leaves, grad)
    out = function(weight_gradients)
    with weight_gradients.put_off() as work:
        out.backward(grad)
    assert [leaf.grad is None for leaf in leaves] == [False, True, True, True, False]
    for product in work:
        product()
    for leaf, same, close in zip(leaves, immediate, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, same)
        torch.testing.assert_close(same, close, rtol=1e-5, atol=1e-5)


def test_grouped_products_are_torchs_own():
    """To the last bit, so that an accelerator computes what it did."""
    counts = [9, 0, 23]
    x, w = torch.randn(32, 8, requires_grad=True), torch.randn(3, 12, 8, requires_grad=True)
    ends = torch.tensor([9, 9, 32], dtype=torch.int32)
    grad = torch.randn(sum(counts), 12)
    mine = grouped_gemm._GroupedLinear.apply(x, w, ends, grouped_gemm.now)
    theirs = F.grouped_mm(x, w.transpose(1, 2), offs=ends)
    assert torch.equal(mine, theirs)
    pairs = zip(*(torch.autograd.grad(out, (x, w), grad) for out in (mine, theirs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
