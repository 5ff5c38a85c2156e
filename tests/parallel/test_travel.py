"""How far rows travel, by counting every choice a router may make."""

from itertools import combinations

import pytest

from model.config import MoEConfig
from parallel.config import Dispatcher
from parallel.travel import blocks_reached, rows_sent

SMALL = MoEConfig(num_experts=12, top_k=3, num_groups=4, top_k_groups=2)


def counted(moe: MoEConfig, blocks: int) -> float:
    """Average the blocks that hold a choice over all groups and all experts inside them."""
    group_size, block_size = moe.num_experts // moe.num_groups, moe.num_experts // blocks
    reached = []
    for groups in combinations(range(moe.num_groups), moe.top_k_groups):
        eligible = [g * group_size + e for g in groups for e in range(group_size)]
        for experts in combinations(eligible, moe.top_k):
            reached.append(len({expert // block_size for expert in experts}))
    return sum(reached) / len(reached)


@pytest.mark.parametrize("blocks", [1, 2, 4, 12])
def test_blocks_reached_is_what_counting_gives(blocks):
    assert blocks_reached(SMALL, blocks) == pytest.approx(counted(SMALL, blocks), rel=1e-12)


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_one_group_is_plain_top_k(blocks):
    moe = MoEConfig(num_experts=8, top_k=2, num_groups=1, top_k_groups=1)
    assert blocks_reached(moe, blocks) == pytest.approx(counted(moe, blocks), rel=1e-12)


def test_deepseek_v3_reaches_less_than_its_four_nodes():
    assert blocks_reached(MoEConfig(), 8) == pytest.approx(3.6, abs=0.05)


def test_two_hop_sends_less_between_nodes_and_what_stays_is_not_sent():
    plain = rows_sent(MoEConfig(), ep=64, node_size=8, dispatcher=Dispatcher.alltoall)
    hops = rows_sent(MoEConfig(), ep=64, node_size=8, dispatcher=Dispatcher.two_hop)
    assert plain.inter + plain.intra == pytest.approx(8 * 63 / 64)
    assert plain.inter == pytest.approx(7)
    assert hops.inter == pytest.approx(blocks_reached(MoEConfig(), 8) * 7 / 8)
    one_node = rows_sent(MoEConfig(), ep=8, node_size=8, dispatcher=Dispatcher.two_hop)
    assert (one_node.inter, one_node.intra) == (0, pytest.approx(7))
