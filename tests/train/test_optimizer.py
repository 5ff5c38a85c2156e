"""AdamW on flat buckets against torch.optim.AdamW and torch's clipping."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from parallel.zero1 import Zero1
from tests.model.te_stand_in import install_stand_in
from train import adamw
from train.config import AdamKernel, Moments, OptimizerConfig
from train.optimizer import AdamW, clip_grad_norm, parameter_rule


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 37), nn.Tanh(), nn.Linear(37, 21)).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x_TD = torch.randn(6, 9, generator=torch.Generator().manual_seed(step))
    dtype = next(model.parameters()).dtype
    return model(x_TD.to(dtype)).float().square().sum()


def engine_of(model: nn.Module, config: OptimizerConfig) -> tuple[Zero1, AdamW]:
    engine = Zero1(model.named_parameters(), rule=parameter_rule(config))
    return engine, AdamW(engine, config)


def state_of(engine: Zero1, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything that a checkpoint keeps of an optimizer on one process, as views."""
    masters = engine.stored(engine.masters(), name="model.{}")
    moments = {f"optim.{name}": moment for name, moment in optimizer.moments().items()}
    return {name: tensor for name, tensor in (masters | moments).items() if isinstance(tensor, Tensor)}


def torch_adamw(model: nn.Module, config: OptimizerConfig, factors: dict[str, float]) -> torch.optim.AdamW:
    groups = [
        {
            "params": [parameter],
            "weight_decay": config.weight_decay if parameter.dim() >= 2 else 0.0,
            "factor": factors.get(name, 1.0),
        }
        for name, parameter in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def torch_step(optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(params=AdamKernel)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AdamKernel:
    """Everything that updates; of Transformer Engine's, the formula of its source."""
    install_stand_in(monkeypatch)
    return request.param


RATES = [1e-2, 5e-3, 2e-2, 1e-3, 1e-3, 3e-3]


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_six_clipped_steps_equal_torch(
    kernel: AdamKernel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "CPU_CHUNK", chunk)
    config = OptimizerConfig(kernel=kernel, moments=Moments.fp32, lr_multipliers={"2.*": 0.5, "*": 2.0})
    factors = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 0.5}
    model, reference = network(), network()
    engine, optimizer = engine_of(model, config)
    truth = torch_adamw(reference, config, factors)
    for step, lr in enumerate(RATES):
        loss_of(model, step).backward()
        loss_of(reference, step).backward()
        norm = clip_grad_norm(engine, max_norm=5.0)
        expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 5.0)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
        optimizer.step(lr=lr)
        torch_step(truth, lr)
        engine.zero_grad()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    state = state_of(engine, optimizer)
    for name, parameter in reference.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"optim.{name}.{kind}"], truth.state[parameter][kind], rtol=1e-5, atol=1e-7
            )


def test_decay_acts_on_matrices_only() -> None:
    config = OptimizerConfig(weight_decay=0.5)
    model = network()
    before = copy.deepcopy(model)
    _, optimizer = engine_of(model, config)
    optimizer.step(lr=0.1)  # the gradients are zero, so decay is all that happens
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = theirs * (1 - 0.1 * 0.5) if name.endswith("weight") else theirs
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)


def test_expert_stacks_decay_and_first_matching_pattern_wins() -> None:
    rule = parameter_rule(OptimizerConfig(lr_multipliers={"layers.0.*": 0.1, "*experts*": 0.2}))
    stack, norm = nn.Parameter(torch.zeros(4, 3, 2)), nn.Parameter(torch.zeros(3))
    assert rule("layers.0.ffn.experts.w1", stack).lr_multiplier == 0.1
    assert rule("layers.1.ffn.experts.w1", stack).lr_multiplier == 0.2
    assert rule("layers.1.attn_norm.weight", norm).lr_multiplier == 1.0
    assert rule("layers.1.ffn.experts.w1", stack).decay
    assert not rule("layers.1.attn_norm.weight", norm).decay


def test_zero_multiplier_freezes(kernel: AdamKernel) -> None:
    config = OptimizerConfig(kernel=kernel, lr_multipliers={"0.*": 0.0})
    model = network()
    before = copy.deepcopy(model)
    _, optimizer = engine_of(model, config)
    loss_of(model, 0).backward()
    optimizer.step(lr=0.1)
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs) == name.startswith("0.")


def test_bf16_moments_are_fp32_adamw_with_rounded_state(kernel: AdamKernel) -> None:
    """Against plain torch arithmetic in which only the stored moments are rounded to BF16."""
    config = OptimizerConfig(kernel=kernel, moments=Moments.bf16)
    model, reference = network(), network()
    engine, optimizer = engine_of(model, config)
    weights = dict(reference.named_parameters())
    avg = {name: torch.zeros_like(p) for name, p in weights.items()}
    square = {name: torch.zeros_like(p) for name, p in weights.items()}
    for count, lr in enumerate(RATES, start=1):
        engine.zero_grad()
        loss_of(model, count).backward()
        optimizer.step(lr=lr)
        reference.zero_grad()
        loss_of(reference, count).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                grad = weight.grad
                assert grad is not None
                avg[name] = 0.9 * avg[name] + 0.1 * grad
                square[name] = 0.95 * square[name] + 0.05 * grad**2
                if weight.dim() >= 2:
                    weight.mul_(1 - lr * config.weight_decay)
                denominator = (square[name] / (1 - 0.95**count)).sqrt() + config.eps
                weight.sub_(lr * (avg[name] / (1 - 0.9**count)) / denominator)
                avg[name], square[name] = avg[name].bfloat16().float(), square[name].bfloat16().float()
    state = state_of(engine, optimizer)
    assert state["optim.0.weight.exp_avg"].dtype == torch.bfloat16
    for name, weight in weights.items():
        # A moment on the border of two BF16 values may round either way: 2^-8 of one of six updates.
        torch.testing.assert_close(state[f"model.{name}"], weight.detach(), rtol=0, atol=1e-4)
        close = (state[f"model.{name}"] - weight.detach()).abs() < 1e-6
        assert close.float().mean() > 0.9


def test_bf16_parameters_follow_fp32_masters() -> None:
    """Updates far below the resolution of BF16 add up in the master until the parameter moves."""
    config = OptimizerConfig(moments=Moments.fp32, weight_decay=0.0)
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    engine = Zero1([("w", parameter)], rule=parameter_rule(config))
    optimizer = AdamW(engine, config)
    for _ in range(100):
        engine.buckets[0].grad.fill_(1.0)
        optimizer.step(lr=1e-4)
    torch.testing.assert_close(engine.buckets[0].master, torch.full((64,), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(parameter, torch.full((8, 8), 0.99).bfloat16())


def test_padding_stays_zero() -> None:
    config = OptimizerConfig()
    model = network()
    engine, optimizer = engine_of(model, config)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step(lr=1e-2)
    views = engine.named_views([bucket.master for bucket in engine.buckets])
    for bucket in engine.buckets:
        inside = torch.cat([views[name].flatten() for name in bucket.names])
        assert bucket.master.count_nonzero() == inside.count_nonzero()


@pytest.mark.parametrize("max_norm", [1e-3, 1e6, float("inf")])
def test_clipping_equals_torch(max_norm: float) -> None:
    model, reference = network(), network()
    engine, _ = engine_of(model, OptimizerConfig())
    loss_of(model, 0).backward()
    loss_of(reference, 0).backward()
    clip_grad_norm(engine, max_norm=max_norm)
    nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=0)


def test_clipping_unscales_first() -> None:
    model, scaled = network(), network()
    engine, _ = engine_of(model, OptimizerConfig())
    scaled_engine, _ = engine_of(scaled, OptimizerConfig())
    loss_of(model, 0).backward()
    (loss_of(scaled, 0) * 4096).backward()
    norm = clip_grad_norm(engine, max_norm=1.0)
    scaled_norm = clip_grad_norm(scaled_engine, max_norm=1.0, loss_scale=4096.0)
    torch.testing.assert_close(scaled_norm, norm, rtol=1e-6, atol=0)
    for mine, theirs in zip(engine.buckets, scaled_engine.buckets, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("moments", [*Moments])
def test_restored_state_continues_bit_for_bit(moments: Moments, tmp_path: Path) -> None:
    config = OptimizerConfig(moments=moments)
    model = network(torch.bfloat16)
    engine, optimizer = engine_of(model, config)

    def train(model: nn.Module, engine: Zero1, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            engine.zero_grad()
            loss_of(model, step).backward()
            optimizer.step(lr=1e-2)

    train(model, engine, optimizer, range(3))
    torch.save(state_of(engine, optimizer), tmp_path / "state.pt")
    train(model, engine, optimizer, range(3, 6))

    resumed = network(torch.bfloat16)
    resumed_engine, resumed_optimizer = engine_of(resumed, config)
    for name, saved in torch.load(tmp_path / "state.pt").items():
        state_of(resumed_engine, resumed_optimizer)[name].copy_(saved)
    resumed_optimizer.num_updates = 3
    resumed_engine.publish()
    train(resumed, resumed_engine, resumed_optimizer, range(3, 6))
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    after, resumed_after = state_of(engine, optimizer), state_of(resumed_engine, resumed_optimizer)
    assert all(torch.equal(after[name], resumed_after[name]) for name in after)


def test_state_names_and_shapes() -> None:
    model = network(torch.bfloat16)
    engine, optimizer = engine_of(model, OptimizerConfig(moments=Moments.bf16))
    state = state_of(engine, optimizer)
    for name, parameter in model.named_parameters():
        assert state[f"model.{name}"].dtype == torch.float32
        for key in (f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"):
            assert state.pop(key).shape == parameter.shape
    assert not state


def test_reset_starts_as_a_new_optimizer_on_the_same_masters() -> None:
    config = OptimizerConfig()
    models = [network(), network()]
    engine, optimizer = engine_of(models[0], config)
    loss_of(models[0], 0).backward()
    optimizer.step(lr=1e-2)
    optimizer.reset()
    models[1].load_state_dict(models[0].state_dict())
    fresh_engine, fresh = engine_of(models[1], config)
    for model, stepped, bucketed in ((models[0], optimizer, engine), (models[1], fresh, fresh_engine)):
        bucketed.zero_grad()
        loss_of(model, 1).backward()
        stepped.step(lr=1e-2)
    after, expected = state_of(engine, optimizer), state_of(fresh_engine, fresh)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert optimizer.num_updates == fresh.num_updates == 1
