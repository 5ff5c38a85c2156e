"""The gate against choices made by hand, and the balance loss against its equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import MoEConfig
from model.router import Router, choose_experts, update_bias
from tests.model.small import relative


def make_router(config: MoEConfig, width: int = 16, seed: int = 0) -> Router:
    router, generator = Router(config, width), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.5)
        router.bias.copy_(torch.randn(router.bias.shape, generator=generator) * 0.3)
    return router


def choose_by_hand(biased: list[float], config: MoEConfig) -> set[int]:
    size = config.num_experts // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    if config.num_groups > 1:
        groups.sort(key=lambda group: sum(sorted((biased[e] for e in group), reverse=True)[:2]), reverse=True)
    allowed = [e for group in groups[: config.top_k_groups] for e in group]
    return set(sorted(allowed, key=lambda e: biased[e], reverse=True)[: config.top_k])


@settings(max_examples=60, deadline=None)
@given(
    num_groups=st.integers(1, 5),
    group_size=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_choice_equals_the_choice_by_hand(
    num_groups: int, group_size: int, seed: int, data: st.DataObject
) -> None:
    top_k_groups = data.draw(st.integers(1, num_groups))
    config = MoEConfig(
        num_experts=num_groups * group_size,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        top_k=data.draw(st.integers(1, top_k_groups * group_size)),
    )
    assert not config.problems()
    biased_TE = torch.randn(7, config.num_experts, generator=torch.Generator().manual_seed(seed))
    chosen_TA = choose_experts(biased_TE, config)
    for biased, chosen in zip(biased_TE.tolist(), chosen_TA.tolist(), strict=True):
        assert len(set(chosen)) == config.top_k
        assert set(chosen) == choose_by_hand(biased, config)


CONFIG = MoEConfig(
    num_experts=8,
    top_k=3,
    num_groups=4,
    top_k_groups=2,
    intermediate_size=4,
    route_scale=2.5,
    balance_loss_weight=0.01,
)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    x_BSD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    return x_BSD.to(dtype).requires_grad_()


@pytest.mark.parametrize("normalize", [True, False])
def test_bias_steers_the_choice_and_leaves_the_weights(normalize: bool) -> None:
    config = MoEConfig(**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__})
    config.normalize_weights = normalize
    router, x_BSD = make_router(config), tokens()
    routing = router(x_BSD)
    affinity_TE = (x_BSD.flatten(0, 1) @ router.weight.T).sigmoid()
    for t, chosen in enumerate(routing.indices_TA.tolist()):
        assert set(chosen) == choose_by_hand((affinity_TE[t] + router.bias).tolist(), config)
        weights = affinity_TE[t, chosen]
        weights = weights / weights.sum() if normalize else weights
        torch.testing.assert_close(routing.weights_TA[t], weights * 2.5)
    router.bias[0] += 10
    assert (router(x_BSD).indices_TA == 0).any(-1).all()


def test_load_is_an_exact_integer_count() -> None:
    routing = make_router(CONFIG)(tokens())
    assert routing.load_E.dtype == torch.int64
    assert routing.load_E.tolist() == [int((routing.indices_TA == e).sum()) for e in range(8)]
    assert int(routing.load_E.sum()) == 2 * 6 * 3


def balance_by_hand(x_BSD: Tensor, router: Router, indices_BSA: Tensor) -> Tensor:
    total = torch.zeros(())
    for x_SD, indices_SA in zip(x_BSD, indices_BSA, strict=True):
        affinity_SE = (x_SD @ router.weight.T).sigmoid()
        share_SE = affinity_SE / affinity_SE.sum(-1, keepdim=True)
        for e in range(CONFIG.num_experts):
            f = CONFIG.num_experts / (CONFIG.top_k * len(x_SD)) * int((indices_SA == e).sum())
            total = total + CONFIG.balance_loss_weight * f * share_SE[:, e].sum() / len(x_SD)
    return total


def test_balance_loss_and_its_gradient_equal_the_equations() -> None:
    router, x_BSD = make_router(CONFIG), tokens()
    routing = router(x_BSD)
    expected = balance_by_hand(x_BSD, router, routing.indices_TA.view(2, 6, 3))
    assert relative(routing.balance_loss, expected) < 1e-6
    ours = torch.autograd.grad(routing.balance_loss, (x_BSD, router.weight))
    by_hand = torch.autograd.grad(expected, (x_BSD, router.weight))
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, by_hand, strict=True))


def test_balance_loss_is_per_sequence() -> None:
    """Two sequences that each favour other experts are unbalanced, though their union is not."""
    router, x_BSD = make_router(CONFIG), tokens()
    losses = [router(x_SD[None]).balance_loss for x_SD in x_BSD]
    torch.testing.assert_close(router(x_BSD).balance_loss, losses[0] + losses[1])
    joined = router(x_BSD.reshape(1, 12, 16)).balance_loss * 2
    assert abs(joined - losses[0] - losses[1]) > 1e-6


def test_weight_gradient_equals_plain_fp32_arithmetic_for_bf16_tokens() -> None:
    router, x_BSD = make_router(CONFIG), tokens(torch.bfloat16)
    routing = router(x_BSD)
    routing.weights_TA.square().sum().backward()
    wide_BSD = x_BSD.detach().float().requires_grad_()
    weight_ED = router.weight.detach().clone().requires_grad_()
    affinity_TE = (wide_BSD.flatten(0, 1) @ weight_ED.T).sigmoid()
    chosen_TA = affinity_TE.gather(1, routing.indices_TA)
    (chosen_TA / chosen_TA.sum(-1, keepdim=True) * 2.5).square().sum().backward()
    assert routing.weights_TA.dtype == torch.float32
    assert router.weight.grad is not None
    assert weight_ED.grad is not None
    assert relative(router.weight.grad, weight_ED.grad) < 1e-5
    assert x_BSD.grad is not None
    assert wide_BSD.grad is not None
    assert x_BSD.grad.dtype == torch.bfloat16
    assert relative(x_BSD.grad.float(), wide_BSD.grad) < 1e-2


def test_bias_moves_against_the_load() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.25, 1.0])
    update_bias(bias_E, torch.tensor([5, 3, 4, 4]), 0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.25, 1.0]


def test_bias_sees_a_difference_of_one_in_counts_that_fp32_cannot_hold() -> None:
    bias_E, load_E = torch.zeros(2), torch.tensor([2**40, 2**40 + 2])
    update_bias(bias_E, load_E, 1.0)
    assert bias_E.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_bias_update_is_the_same_whatever_the_accumulation(num_microbatches: int) -> None:
    router = make_router(CONFIG)
    x_BSD = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    load_E = torch.zeros(8, dtype=torch.int64)
    for part_BSD in x_BSD.chunk(num_microbatches):
        load_E += router(part_BSD).load_E
    whole_E = router(x_BSD).load_E
    assert torch.equal(load_E, whole_E)
    expected_E = router.bias + 0.001 * torch.sign(whole_E.double().mean() - whole_E).float()
    update_bias(router.bias, load_E, 0.001)
    torch.testing.assert_close(router.bias, expected_E, rtol=0, atol=1e-7)
