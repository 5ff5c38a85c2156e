"""The flat buckets: values kept, gradients in FP32 and in place, the norm exact, masters published."""

import pytest
import torch
from torch import Tensor, nn

from model.init import Share
from parallel import zero1
from parallel.bucket import Bucket, ParameterRule
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.pieces import Pieces
from parallel.zero1 import Zero1
from tests.distributed import run_ranks

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


def test_a_full_bucket_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bucket holds is in flight at once, so a large model needs many of them."""
    monkeypatch.setattr(zero1, "BUCKET_ELEMENTS", 100)
    parameters = [(str(i), nn.Parameter(torch.full((50,), float(i)))) for i in range(5)]
    engine = Zero1(parameters, rule=lambda name, p: RULE)
    assert [bucket.names for bucket in engine.buckets] == [["0", "1"], ["2", "3"], ["4"]]
    assert [parameter[0].item() for _, parameter in parameters] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_checkpoint_knows_which_piece_of_the_whole_is_held_here(dim: int) -> None:
    whole, found = torch.arange(48.0).view(6, 8), torch.zeros(6, 8)
    for index in range(2):
        share = Share(dim, index, 2)
        parameter = nn.Parameter(share.of(whole).clone())
        engine = Zero1([("w", parameter)], rule=lambda name, p: RULE, share=lambda name, s=share: s)
        held = engine.stored(engine.masters(), name="{}")["w"]
        assert isinstance(held, Pieces)
        assert held.shape == whole.shape
        for piece in held.pieces:
            box = zip(piece.offsets, piece.tensor.shape, strict=True)
            found[tuple(slice(start, start + size) for start, size in box)] += piece.tensor
    assert torch.equal(found, whole)


def two_steps_by_stage(rank: int) -> None:
    """Parameters of two stages, and one that both have a share in."""
    mesh = build_mesh(Layout(dp_shard=2), rank=rank)
    calls: list[str] = []
    mesh.trace.listeners.append(lambda call: calls.append(f"{call.operation} {call.num_bytes}"))
    parameters = {name: nn.Parameter(torch.ones(128 * (i + 1))) for i, name in enumerate("abc")}
    engine = Zero1(
        parameters.items(),
        rule=lambda name, p: RULE,
        reduction=lambda name: mesh.dense,
        stage={"a": 0, "b": 1, "c": None}.__getitem__,
        world=mesh.world,
    )
    sums = {"a": 512, "b": 1024, "c": 1536}
    for step in (1, 2):
        calls.clear()
        for parameter in parameters.values():
            (step * (rank + 1) * parameter).sum().backward()
        engine.start_reduce(1)
        assert calls == [f"reduce_scatter {sums['b']}"]
        engine.start_reduce(0)
        assert calls[1:] == [f"reduce_scatter {sums['a']}"]
        engine.finish_reduce()
        assert [call for call in calls if "scatter" in call][2:] == [f"reduce_scatter {sums['c']}"]
        assert all(bucket.own_grad.eq(3 * step).all() for bucket in engine.buckets)
        engine.zero_grad()


def test_a_stages_gradients_are_summed_as_soon_as_it_is_done() -> None:
    run_ranks(2, two_steps_by_stage)
