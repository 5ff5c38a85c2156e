"""Dispatch, experts and combine against every token computed by hand."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import MoEConfig
from model.dispatch import LocalDispatcher, host_counts
from model.experts import Experts
from model.router import Routing
from tests.model.small import relative

T, D, E, A, INTERMEDIATE = 13, 8, 6, 3, 5


def make_experts(dtype: torch.dtype = torch.float32) -> Experts:
    config = MoEConfig(num_experts=E, top_k=A, intermediate_size=INTERMEDIATE, num_groups=1, top_k_groups=1)
    experts, generator = Experts(config, D, dtype=dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return experts


def make_routing(indices_TA: Tensor) -> Routing:
    weights_TA = torch.rand(indices_TA.shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    load_E = torch.bincount(indices_TA.flatten(), minlength=E)
    return Routing(indices_TA, weights_TA, load_E, torch.zeros(()))


def random_choices(seed: int, allowed: int = E) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(allowed, generator=generator)[:A] for _ in range(T)])


def by_hand(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    outputs = []
    for t in range(T):
        y_D = torch.zeros(D)
        for a in range(A):
            e = int(routing.indices_TA[t, a])
            hidden = F.silu(experts.w1[e] @ x_TD[t]) * (experts.w3[e] @ x_TD[t])
            y_D = y_D + routing.weights_TA[t, a] * (experts.w2[e] @ hidden)
        outputs.append(y_D)
    return torch.stack(outputs)


def through_dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(x_TD, routing)
    return dispatcher.combine(experts(dispatched), dispatched)


def gradients(y_TD: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((y_TD * direction).sum(), leaves))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), allowed=st.integers(A, E))
def test_equals_every_token_by_hand(seed: int, allowed: int) -> None:
    """With fewer experts allowed than there are, the others are empty."""
    experts, routing = make_experts(), make_routing(random_choices(seed, allowed))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    leaves = [x_TD, routing.weights_TA, *experts.parameters()]
    ours, expected = through_dispatch(x_TD, routing, experts), by_hand(x_TD, routing, experts)
    assert relative(ours, expected) < 1e-5
    for got, want in zip(gradients(ours, leaves), gradients(expected, leaves), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), allowed=st.integers(A, E))
def test_rows_are_sorted_by_expert_and_none_is_lost(seed: int, allowed: int) -> None:
    routing = make_routing(random_choices(seed, allowed))
    x_TD = torch.arange(T, dtype=torch.float32)[:, None].expand(T, D)
    dispatched = LocalDispatcher().dispatch(x_TD, routing)
    assert sum(dispatched.counts) == T * A == len(dispatched.rows_RD) == len(dispatched.row_weights_R)
    rows = dispatched.rows_RD[:, 0].long().split(dispatched.counts)
    weights = dispatched.row_weights_R.split(dispatched.counts)
    for e in range(E):
        tokens, choices = (routing.indices_TA == e).nonzero(as_tuple=True)
        assert torch.equal(rows[e], tokens)
        assert torch.equal(weights[e], routing.weights_TA[tokens, choices])


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    experts, routing = make_experts(), make_routing(random_choices(0, allowed=A))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
    through_dispatch(x_TD, routing, experts).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[A:].abs().max() == 0
        assert parameter.grad[:A].abs().amax(dim=(1, 2)).min() > 0


def test_bf16_rows_are_summed_in_fp32() -> None:
    """256 + 1 + 1 is 258 in FP32 but 256 when every partial sum is rounded to BF16."""
    routing = make_routing(torch.tensor([[0, 1, 2]]))
    dispatched = LocalDispatcher().dispatch(torch.zeros(1, D, dtype=torch.bfloat16), routing)
    rows_RD = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)[:, None].expand(3, D).contiguous()
    combined = LocalDispatcher().combine(rows_RD, dispatched)
    assert combined.dtype == torch.bfloat16
    assert combined.eq(258).all()


def test_host_counts_are_python_integers() -> None:
    assert host_counts(torch.tensor([3, 0, 2**40])) == [3, 0, 2**40]
