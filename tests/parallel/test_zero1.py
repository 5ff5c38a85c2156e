"""The flat buckets: values kept, gradients in FP32 and in place, the norm exact, masters published."""

import pytest
import torch
from torch import Tensor, nn

from parallel.bucket import Bucket, ParameterRule
from parallel.zero1 import Zero1

RULE = ParameterRule(decay=True, lr_multiplier=1.0)


def by_shape(name: str, parameter: nn.Parameter) -> ParameterRule:
    return ParameterRule(decay=parameter.dim() >= 2, lr_multiplier=0.5 if "head" in name else 1.0)


class Tiny(nn.Module):
    """Odd sizes, a shared module, and both storage types, as the real model has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(11, 5).to(dtype))
        self.norm = nn.Parameter(torch.randn(5))
        self.experts = nn.Parameter(torch.randn(3, 7, 5).to(dtype))
        self.head = nn.Parameter(torch.randn(7, 7).to(dtype))
        self.shared = nn.ModuleDict({"a": nn.Linear(7, 7), "b": nn.Identity()})
        self.shared["b"] = self.shared["a"]

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TD = self.embed[tokens_T] * self.norm.to(self.embed.dtype)
        y_TI = (x_TD @ self.experts.sum(0).T) @ self.head
        return self.shared["b"](self.shared["a"](y_TI.float())).square().mean()


def built(dtype: torch.dtype) -> tuple[Tiny, Zero1]:
    model = Tiny(dtype)
    return model, Zero1(model.named_parameters(), rule=by_shape)


def bucket_of(engine: Zero1, name: str) -> Bucket:
    return next(bucket for bucket in engine.buckets if name in bucket.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_survive_and_share_memory_with_the_buckets(dtype: torch.dtype) -> None:
    before = {name: p.detach().clone() for name, p in Tiny(dtype).named_parameters()}
    model, engine = built(dtype)
    flats = engine.named_views([bucket.flat for bucket in engine.buckets])
    grads = engine.named_views([bucket.grad for bucket in engine.buckets])
    assert flats.keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == flats[name].data_ptr()
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.data_ptr() == grads[name].data_ptr()
        assert parameter.data_ptr() % 128 == bucket_of(engine, name).flat.data_ptr() % 128


def test_buckets_gather_one_storage_type_and_one_rule() -> None:
    model, engine = built(torch.bfloat16)
    named = dict(model.named_parameters())
    for bucket in engine.buckets:
        assert {named[name].dtype for name in bucket.names} == {bucket.flat.dtype}
        assert {by_shape(name, named[name]) for name in bucket.names} == {bucket.rule}
        assert bucket.grad.dtype == bucket.master.dtype == torch.float32
        assert bucket.flat.shape == bucket.grad.shape == bucket.master.shape
    assert sorted(name for bucket in engine.buckets for name in bucket.names) == sorted(named)
    keys = [(bucket.flat.dtype, bucket.rule) for bucket in engine.buckets]
    assert len(set(keys)) == len(keys) == 4


def test_fp32_masters_are_the_parameters_themselves() -> None:
    _, engine = built(torch.bfloat16)
    for bucket in engine.buckets:
        shared = bucket.master.data_ptr() == bucket.flat.data_ptr()
        assert shared == (bucket.flat.dtype == torch.float32)
        assert torch.equal(bucket.master, bucket.flat.float())


def test_gradients_equal_those_of_the_unwrapped_model() -> None:
    plain, (model, engine) = Tiny(torch.float32), built(torch.float32)
    tokens_T = torch.tensor([0, 3, 10, 3])
    for _ in range(2):
        plain(tokens_T).backward()
        model(tokens_T).backward()
    grads = engine.named_views([bucket.grad for bucket in engine.buckets])
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-6)
    engine.zero_grad()
    assert all(not bucket.grad.any() for bucket in engine.buckets)


def test_bf16_parameters_accumulate_their_gradients_in_fp32() -> None:
    """A BF16 sum of 1 + 300 * 2^-9 would stay at 1: each addend is below half of its last place."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    engine = Zero1([("w", parameter)], rule=lambda name, p: RULE)
    buffer = engine.buckets[0].grad
    for factor in [1.0] + [2.0**-9] * 300:
        (parameter * factor).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.data_ptr() == buffer.data_ptr()
    assert torch.equal(parameter.grad, torch.full((4, 4), 1.0 + 300 * 2.0**-9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_scaling_equal_torch(dtype: torch.dtype) -> None:
    _, engine = built(dtype)
    torch.manual_seed(1)
    for bucket in engine.buckets:
        for view in (slot.view(bucket.grad) for slot in bucket.slots):
            view.normal_()
    views = engine.named_views([bucket.grad for bucket in engine.buckets])
    expected = torch.nn.utils.get_total_norm([view.double() for view in views.values()])
    assert engine.grad_norm().dtype == torch.float32
    torch.testing.assert_close(engine.grad_norm().double(), expected, rtol=1e-6, atol=0)
    engine.scale_grad(torch.tensor(0.25))
    torch.testing.assert_close(engine.grad_norm().double(), expected / 4, rtol=1e-6, atol=0)


def test_norm_of_a_long_bucket_keeps_its_digits() -> None:
    """Small gradients vanish from one long FP32 sum of squares: torch's vector_norm is off by 2.5e-5 here."""
    parameter = nn.Parameter(torch.zeros(1 << 22))
    engine = Zero1([("w", parameter)], rule=lambda name, p: RULE)
    engine.buckets[0].grad.fill_(1e-3)[0] = 100.0
    expected = (100.0**2 + ((1 << 22) - 1) * 1e-3**2) ** 0.5
    assert engine.grad_norm().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, -1])
def test_norm_shows_one_bad_gradient(bad: float, index: int) -> None:
    _, engine = built(torch.bfloat16)
    engine.buckets[index].slots[-1].view(engine.buckets[index].grad).view(-1)[-1] = bad
    assert not torch.isfinite(engine.grad_norm())


def test_publish_rounds_the_masters_into_the_parameters() -> None:
    model, engine = built(torch.bfloat16)
    for bucket in engine.buckets:
        bucket.master.add_(1e-4)
    masters = engine.named_views([bucket.master for bucket in engine.buckets])
    engine.publish()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].to(parameter.dtype))


def test_publishing_a_part_leaves_the_rest() -> None:
    parameter = nn.Parameter(torch.zeros(128, dtype=torch.bfloat16))
    engine = Zero1([("w", parameter)], rule=lambda name, p: RULE)
    engine.buckets[0].master.fill_(1.0)
    engine.buckets[0].publish(32, 96)
    assert parameter.sum() == 64
    assert parameter[32:96].eq(1).all()


def test_padding_never_takes_part() -> None:
    model, engine = built(torch.float32)
    model(torch.tensor([1, 2])).backward()
    covered = sum(view.numel() for view in engine.named_views([b.grad for b in engine.buckets]).values())
    assert covered == sum(p.numel() for p in model.parameters())
    assert covered < sum(bucket.grad.numel() for bucket in engine.buckets)
    views = engine.named_views([b.grad for b in engine.buckets]).values()
    views_norm = torch.nn.utils.get_total_norm(views)
    torch.testing.assert_close(engine.grad_norm(), views_norm, rtol=1e-6, atol=0)


def test_one_parameter_under_two_names_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"first and second are one tensor"):
        Zero1([("first", parameter), ("second", parameter)], rule=lambda name, p: RULE)


def test_named_views_needs_one_tensor_per_bucket() -> None:
    _, engine = built(torch.float32)
    with pytest.raises(ValueError, match="zip"):
        engine.named_views([engine.buckets[0].flat])
