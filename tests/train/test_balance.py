"""The bias update of all routers from exact counts."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.config import MoEConfig
from model.router import Router
from train.balance import update_router_biases


def routers(num_layers: int, num_experts: int = 4) -> dict[str, Router]:
    config = MoEConfig(num_experts=num_experts, top_k=2, num_groups=1, top_k_groups=1)
    return {f"layers.{i}": Router(config, hidden_size=3) for i in range(num_layers)}


def test_each_router_moves_by_its_own_row() -> None:
    built = routers(2)
    load_LE = torch.tensor([[10, 20, 30, 20], [7, 7, 7, 7]])
    update_router_biases(built, load_LE, speed=0.25)
    assert built["layers.0"].bias.tolist() == [0.25, 0.0, -0.25, 0.0]
    assert built["layers.1"].bias.tolist() == [0.0] * 4
    update_router_biases(built, load_LE.flip(0), speed=0.25)
    assert built["layers.0"].bias.tolist() == [0.25, 0.0, -0.25, 0.0]
    assert built["layers.1"].bias.tolist() == [0.25, 0.0, -0.25, 0.0]


def test_one_token_more_than_the_mean_counts_even_in_a_large_batch() -> None:
    """A count rounded to BF16, or to FP32 beyond 2^24, would lose the one token."""
    built = routers(1)
    base = (1 << 25) + 257
    update_router_biases(built, torch.tensor([[base + 1, base - 1, base, base]]), speed=0.001)
    assert built["layers.0"].bias.sign().tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_zero_speed_changes_nothing() -> None:
    built = routers(1)
    built["layers.0"].bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    before = built["layers.0"].bias.clone()
    update_router_biases(built, torch.tensor([[1, 2, 3, 4]]), speed=0.0)
    assert torch.equal(built["layers.0"].bias, before)


def test_a_row_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        update_router_biases(routers(2), torch.ones(3, 4, dtype=torch.int64), speed=0.001)


@given(st.lists(st.integers(0, 10**8), min_size=4, max_size=4))
def test_equals_exact_rational_arithmetic(loads: list[int]) -> None:
    built = routers(1)
    load_LE: Tensor = torch.tensor([loads])
    update_router_biases(built, load_LE, speed=1.0)
    mean = Fraction(sum(loads), 4)
    assert built["layers.0"].bias.tolist() == [(mean > load) - (mean < load) for load in loads]
