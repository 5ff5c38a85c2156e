"""How far a token's rows travel to its experts, on average over random routing. Imports no torch.

The router picks `top_k_groups` of the groups of experts and `top_k` experts inside them (arXiv 2412.19437,
section 2.1.2). Experts lie in order on the processes, so a node, or a process, holds a block of them. Which
of them a token reaches follows from counting: with balanced routing, each choice of groups and each choice of
experts inside them is as likely as any other.
"""

from dataclasses import dataclass
from math import comb

from model.config import MoEConfig
from parallel.config import Dispatcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows that a process sends for each of its tokens on the way to the experts; as many come back."""

    inter: float
    """To other nodes."""
    intra: float
    """To other processes of a node."""


def rows_sent(moe: MoEConfig, *, ep: int, node_size: int, dispatcher: Dispatcher) -> Rows:
    """Return what `ep` processes that hold all experts send, `node_size` of them on a node.

    `alltoall` sends a row for each of the top_k choices; `two_hop` one for each node, then one for each
    process inside the node. What stays on the node, or on the process, is not counted.
    """
    nodes = -(-ep // node_size)
    per_node = min(ep, node_size)
    if dispatcher is Dispatcher.alltoall or nodes == 1:
        return Rows(
            inter=moe.top_k * (1 - per_node / ep),
            intra=moe.top_k * (per_node - 1) / ep,
        )
    return Rows(
        inter=blocks_reached(moe, nodes) * (1 - 1 / nodes),
        intra=blocks_reached(moe, ep) * (1 - 1 / per_node),
    )


def blocks_reached(moe: MoEConfig, blocks: int) -> float:
    """Return how many of `blocks` equal blocks of the experts hold at least one of a token's, on average.

    With 8 groups of 32 experts of which 4 are chosen, 8 experts among them reach 3.6 blocks of 8.
    """
    groups, chosen, choices = moe.num_groups, moe.top_k_groups, moe.top_k
    group_size = moe.num_experts // groups
    eligible = chosen * group_size
    block_size = moe.num_experts / blocks
    if block_size >= group_size:  # a block is some whole groups; j of them are among the chosen ones
        whole = round(block_size / group_size)
        missed = sum(
            comb(whole, j)
            * comb(groups - whole, chosen - j)
            / comb(groups, chosen)
            * _avoid(eligible, j * group_size, choices)
            for j in range(min(whole, chosen) + 1)
        )
    else:  # a block is a part of one group
        missed = 1 - chosen / groups * (1 - _avoid(eligible, round(block_size), choices))
    return blocks * (1 - missed)


def _avoid(eligible: int, block: int, choices: int) -> float:
    """Return the chance that `choices` of the eligible experts are all outside a block of them."""
    return comb(eligible - block, choices) / comb(eligible, choices)
