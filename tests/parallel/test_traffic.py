"""Bytes of exchanges in closed form, against rows counted one by one."""

import random

import pytest

from model.config import Compute, Gemm, ModelConfig, PrecisionConfig, Recompute
from parallel.config import Dispatcher, ParallelConfig, Schedule
from parallel.traffic import exchanged_bytes, hops, row_bytes, row_bytes_of
from tests.model.small import small

MODEL = small(num_experts=32, top_k=4, num_groups=4, top_k_groups=2, hidden_size=64)
TOKENS = 2000


def reached(model: ModelConfig, members: int) -> float:
    """Return how many of `members` blocks of experts a token reaches, by routing tokens at random."""
    draw, moe = random.Random(0), model.moe
    size, block = moe.num_experts // moe.num_groups, moe.num_experts // members
    total = 0
    for _ in range(TOKENS):
        groups = draw.sample(range(moe.num_groups), moe.top_k_groups)
        eligible = [group * size + i for group in groups for i in range(size)]
        total += len({expert // block for expert in draw.sample(eligible, moe.top_k)})
    return total


@pytest.mark.parametrize(("ep", "node_size"), [(16, 4), (16, 8), (8, 4), (32, 2)])
def test_two_hops_send_a_row_for_each_distinct_member(ep: int, node_size: int) -> None:
    parallel = ParallelConfig(ep=ep, dispatcher=Dispatcher.two_hop, node_size=node_size)
    inter, intra = hops(MODEL, parallel, tokens=TOKENS)
    assert (inter.members, intra.members) == (ep // node_size, node_size)
    assert inter.rows == pytest.approx(reached(MODEL, ep // node_size), rel=0.02)
    assert intra.rows == pytest.approx(reached(MODEL, ep), rel=0.02)


def test_nothing_travels_where_all_experts_are_here() -> None:
    row = row_bytes(64, compute=Compute.bf16, fp8=False)
    assert exchanged_bytes(MODEL, ParallelConfig(), tokens=TOKENS, row=row) == {}


def test_one_exchange_by_hand() -> None:
    row = row_bytes(64, compute=Compute.bf16, fp8=False)
    parallel = ParallelConfig(ep=4)
    # a row for each of four choices, on four trips; a weight and its gradient with each; 32 counts
    expected = 4 * TOKENS * (4 * 128 + 2 * 4) + 32 * 8
    assert exchanged_bytes(MODEL, parallel, tokens=TOKENS, row=row) == {"ep": expected}
    # again: rows, their weights and the counts
    full = ParallelConfig(ep=4, recompute=Recompute.full)
    more = 4 * TOKENS * (128 + 4) + 32 * 8
    assert exchanged_bytes(MODEL, full, tokens=TOKENS, row=row) == {"ep": expected + more}
    replayed = ParallelConfig(ep=4, recompute=Recompute.full, pp=2, schedule=Schedule.dualpipev)
    more += 4 * TOKENS * 128
    assert exchanged_bytes(MODEL, replayed, tokens=TOKENS, row=row) == {"ep": expected + more}


def test_codes_halve_two_of_the_four_trips() -> None:
    row = row_bytes_of(ModelConfig(), PrecisionConfig(gemm=Gemm.fp8_triton))
    assert (row.dispatch, row.combine_gradient) == (7168 + 56, 7168 + 56)
    assert (row.combine, row.dispatch_gradient) == (2 * 7168, 2 * 7168)
    plain = row_bytes_of(ModelConfig(), PrecisionConfig(gemm=Gemm.fp8_triton, fp8_dispatch=False))
    assert plain == row_bytes_of(ModelConfig(), PrecisionConfig())
