"""Transformer Engine's adapter: parameters stay ours, gradients arrive where ours do, calls fit its own.

Transformer Engine itself does not run here: see te_stand_in.py for what takes its place.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.backends.te import TeWeights, install_te
from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig, Recompute
from model.experts import Experts
from model.kernels.grouped_gemm import expert_ffn
from model.linear import Linear
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model import te_stand_in
from tests.model.oracle import randomize
from tests.model.small import relative, small
from tests.model.te_signatures import read, stored
from tests.model.te_stand_in import install_stand_in

S = 12
SIZES = {  # all widths are multiples of 16, as its FP8 products need
    "hidden_size": 48,
    "num_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "dense_intermediate_size": 32,
    "intermediate_size": 16,
    "num_mtp_layers": 1,
}


def config(scales: Fp8Scales = Fp8Scales.power_of_two) -> PrecisionConfig:
    return PrecisionConfig(gemm=Gemm.fp8_te, fp8_scales=scales)


def make(recompute: Recompute = Recompute.none, **sizes: int) -> Transformer:
    """Return a model in FP32 whose gradients exist."""
    model = Transformer(small(**SIZES | sizes), recompute=recompute, compute=Compute.fp32)
    randomize(model, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def loss_of(model: Transformer, microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(microbatch)
    tokens_BKS = torch.randint(64, (2, 1 + len(model.mtp), S), generator=generator)
    output = model(tokens_BKS, torch.arange(S).expand(2, -1), balance_scale=0.5)
    weights = [torch.randn(hidden.shape, generator=generator) for hidden in output.hidden_KBSD]
    pairs = zip(output.hidden_KBSD, weights, strict=True)
    return torch.stack([(hidden * weight).sum() for hidden, weight in pairs]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(model: Transformer, later: WeightGradients | None = None) -> dict[str, Tensor]:
    """Return the gradients of two microbatches whose weight gradients `later` has put off, the last first."""
    waiting = []
    for microbatch in range(2):
        if later is None:
            loss_of(model, microbatch).backward()
            continue
        with later.put_off() as work:
            loss_of(model, microbatch).backward()
        waiting.append(work)
    for work in reversed(waiting):
        assert len(work) > 30
        for product in work:
            product()
    return gradients(model)


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("recompute", Recompute)
def test_gradients_of_a_whole_model(
    monkeypatch: pytest.MonkeyPatch, recompute: Recompute, put_off: bool
) -> None:
    """With plain products, those of the model without Transformer Engine."""
    expected = run(make())
    install_stand_in(monkeypatch)
    model, later = make(recompute), WeightGradients()
    install_te(model, config(), later)
    install(model, later)
    for name, gradient in run(model, later if put_off else None).items():
        assert relative(gradient, expected[name]) < 1e-5, name
        assert gradient.any() or name == "head.weight"


def test_names_and_memory_of_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model = make()
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    install_te(model, config())
    run(model)
    assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()} == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not [name for p in parameters.values() for name in ("main_grad",) if hasattr(p, name)]


def test_weights_that_move_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when they become views of flat buffers, gradients with them."""
    install_stand_in(monkeypatch)
    model, expected = make(), run(make())
    weights = install_te(model, config())
    loss_of(model, 5).backward()
    weights.forget()
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.detach().clone(), torch.zeros_like(parameter)
    for name, gradient in run(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_codes_are_kept_until_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model = make()
    weights: TeWeights = install_te(model, config())
    before = loss_of(model, 0).item()
    with torch.no_grad():
        model.layers["0"].attn.wo.weight.mul_(2)
    assert loss_of(model, 0).item() == before
    weights.forget()
    assert loss_of(model, 0).item() != before


def test_gradients_add_up_whatever_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first microbatch after codes were forgotten, which is_first_microbatch would overwrite."""
    install_stand_in(monkeypatch)
    model, plain = make(), make()
    weights = install_te(model, config())
    for each in (model, plain):
        for step in range(2):
            weights.forget()
            loss_of(each, step).backward()
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(plain)[name]) < 1e-5, name


def test_gradients_that_do_not_exist_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model, expected = make(), run(make())
    install_te(model, config())
    for parameter in model.parameters():
        parameter.grad = None
    for name, gradient in run(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_nothing_runs_backward_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model, expected = make(), loss_of(make(), 0)
    install_te(model, config())
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        assert loss_of(model, 0).item() == pytest.approx(expected.item(), rel=1e-5)
    wo = model.layers["0"].attn.wo.weight.requires_grad_(False)
    loss_of(model, 0).backward()
    assert wo.grad is None
    assert model.layers["0"].attn.wkv_b.weight.grad is not None


def test_a_weight_that_thaws_has_no_gradient_of_when_it_was_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module would have queued its product, and multiplied that one first."""
    install_stand_in(monkeypatch)
    model, plain = make(), make()
    install_te(model, config())
    for each in (model, plain):
        with torch.no_grad():
            loss_of(each, 0)
        wo = each.layers["0"].attn.wo.weight
        for thawed in (False, True):
            wo.requires_grad_(thawed)
            loss_of(each, int(thawed)).backward()
    for name, gradient in gradients(model).items():
        assert relative(gradient, gradients(plain)[name]) < 1e-5, name


def test_experts_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model = make()
    install_te(model, config())
    (experts,) = (module for name, module in model.named_modules() if name == "layers.2.ffn.experts")
    assert isinstance(experts, Experts)
    generator = torch.Generator().manual_seed(0)
    stacks = (experts.w1, experts.w3, experts.w2)
    for counts in ([0] * 8, [0, 3, 0, 130, 0, 0, 1, 0]):
        rows = torch.randn(sum(counts), 48, generator=generator).requires_grad_()
        weights = torch.rand(sum(counts), generator=generator).requires_grad_()
        results = []
        for function in (experts.feed_forward, partial(expert_ffn)):
            for tensor in (rows, weights, *stacks):
                tensor.grad = torch.zeros_like(tensor)
            y = function(rows, *stacks, counts, weights)
            y.backward(torch.ones_like(y))
            results.append([y.detach(), *(t.grad.clone() for t in (rows, weights, *stacks))])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scales", Fp8Scales)
def test_recipes_on_hopper(monkeypatch: pytest.MonkeyPatch, scales: Fp8Scales) -> None:
    """Powers of two where the configuration has them: see test_fp8.py for the other backends."""
    install_stand_in(monkeypatch)
    model = make()
    install_te(model, config(scales))
    loss_of(model, 0)
    others = scales is Fp8Scales.power_of_two
    special = {
        "attn.wo.weight": (True, others, others),
        "experts.w1": (True, others, others),
        "experts.w3": (True, others, others),
        "experts.w2": (others, others, True),
    }
    seen = 0
    for name, weight in model.named_parameters():
        if used := te_stand_in.recipes.get(weight.data_ptr()):
            assert type(used).__name__ == "Float8BlockScaling"
            flags = tuple(
                getattr(used, f"fp8_quant_{operand}").power_2_scale
                for operand in ("fwd_inp", "fwd_weight", "bwd_grad")
            )
            (expected, *_) = [flag for end, flag in special.items() if name.endswith(end)] or [(others,) * 3]
            assert flags == expected, name
            seen += 1
    assert seen == len(te_stand_in.recipes) > 30


def test_recipe_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, capability=(10, 0))
    model = make(
        hidden_size=64, kv_lora_rank=32, qk_rope_head_dim=32, intermediate_size=32
    )  # multiples of 32
    install_te(model, config())
    loss_of(model, 0)
    assert {type(used).__name__ for used in te_stand_in.recipes.values()} == {"MXFP8BlockScaling"}


def test_what_is_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch)
    model = make()
    plain = {name: module.gemm for name, module in model.named_modules() if isinstance(module, Linear)}
    install_te(model, config())
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            assert (module.gemm is plain[name]) == (".attn." not in name and ".ffn." not in name), name
        if isinstance(module, Experts):
            assert module.feed_forward is not expert_ffn


def test_signatures_are_those_of_the_wheel() -> None:
    """Regenerate: python -m tests.model.te_signatures WHEEL."""
    wheel = os.environ.get("TRANSFORMER_ENGINE_WHEEL")
    if wheel is None:
        pytest.skip("TRANSFORMER_ENGINE_WHEEL names no wheel")
    assert read(Path(wheel)) == stored()


def test_what_is_relied_on_beside_the_interface_exists() -> None:
    assert all(stored()["attributes"].values())
