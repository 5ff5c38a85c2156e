"""A whole model under the FP8 policy: what is FP8, and the same bits however the step is run."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block
from model.config import Compute, Fp8Scales, Recompute
from model.experts import Experts
from model.feedforward import FeedForward
from model.fp8 import install_fp8
from model.kernels.grouped_gemm import expert_ffn
from model.linear import Linear
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model.plain_fp8 import make, plain_experts, plain_gated, plain_linear, policy, scales_of
from tests.model.small import relative
from tests.model.trainable import loss_of


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def install_plainly(model: Transformer, scales: Fp8Scales) -> None:
    usual, attention_output, experts = scales_of(scales)
    for layer in [*model.layers.values(), *(depth.block for depth in model.mtp.values())]:
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                module.gemm = partial(plain_linear, **(attention_output if name == "attn.wo" else usual))
            if isinstance(module, FeedForward):
                module.gated_gemm = partial(plain_gated, **usual)
            if isinstance(module, Experts):
                module.feed_forward = partial(plain_experts, two=experts)


@pytest.mark.parametrize("scales", Fp8Scales)
def test_a_whole_model_against_explicit_quantisation(scales: Fp8Scales) -> None:
    """In FP32, where only the order of a few sums differs; that moves a value at a boundary to the next code.

    A wrong block or scale anywhere would show as percents.
    """
    plain, ours = make(Compute.fp32), make(Compute.fp32)
    install_plainly(plain, scales)
    install_fp8(ours, policy(scales))
    losses = [loss_of(model, 0) for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for name, gradient in gradients(ours).items():
        assert relative(gradient, gradients(plain)[name]) < 2e-3, name


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_recomputation_and_putting_off_change_no_bit(scales: Fp8Scales, compute: Compute) -> None:
    expected: dict[str, Tensor] = {}
    for recompute in Recompute:
        for put_off in (False, True):
            model, later = make(compute, recompute), WeightGradients()
            install_fp8(model, policy(scales), later if put_off else None)
            install(model, later)
            waiting = []
            for microbatch in range(2):
                loss = loss_of(model, microbatch)
                if put_off:
                    with later.put_off() as work:
                        loss.backward()
                    waiting.append(work)
                else:
                    loss.backward()
            for work in waiting:
                assert len(work) > 30
                for product in reversed(work):
                    product()
            expected = expected or gradients(model)
            for name, gradient in gradients(model).items():
                assert torch.equal(gradient, expected[name]), (recompute, put_off, name)
    assert all(gradient.any() for name, gradient in expected.items() if name != "head.weight")


@pytest.mark.parametrize("scales", Fp8Scales)
def test_gradients_stay_near_those_of_fp32(scales: Fp8Scales) -> None:
    """A band, not a proof: E4M3 rounds operands by 2 to 3 percent. No experts, whose choice would flip."""
    plain, ours = (make(Compute.fp32, num_dense_layers=3, num_mtp_layers=0) for _ in range(2))
    install_fp8(ours, policy(scales))
    for model in (plain, ours):
        loss_of(model, 0).backward()
    for name, gradient in gradients(ours).items():
        if name != "head.weight":
            assert 1e-2 < relative(gradient, gradients(plain)[name]) < 0.6, name


def test_what_is_fp8_and_what_is_not() -> None:
    model = make(Compute.bf16)
    install_fp8(model, policy(Fp8Scales.deepseek))
    for name, module in model.named_modules():
        inside = ".attn." in name or ".ffn." in name
        if isinstance(module, Linear):
            assert (module.gemm is F.linear) != inside, name
        if isinstance(module, Experts):
            assert module.feed_forward is not expert_ffn
    assert model.head.gemm is F.linear
    assert model.mtp["0"].eh_proj.gemm is F.linear
    assert sum(isinstance(module, Block) for module in model.modules()) == 4


def test_scales_of_deepseek() -> None:
    """Section 3.3.3: powers of two for the input of attention's output and what experts exchange."""
    deepseek, rounded = policy(Fp8Scales.deepseek), policy(Fp8Scales.power_of_two)
    assert [deepseek.linear_scales(name).x for name in ("attn.wo", "attn.wq_a", "ffn.w2")] == [
        True,
        False,
        False,
    ]
    assert not deepseek.linear_scales("attn.wo").others
    assert rounded.linear_scales("ffn.w1").x
    assert rounded.linear_scales("ffn.w1").others
