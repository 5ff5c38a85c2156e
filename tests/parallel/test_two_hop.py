"""Two hops: the same results as on one process, and between nodes a token travels once."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.config import Recompute
from model.router import Routing
from parallel.groups import Group, Trace
from parallel.two_hop import TwoHopDispatcher
from tests.distributed import run_ranks
from tests.parallel.dispatch_parity import (
    CONFIG,
    NUM_EXPERTS,
    TOP_K,
    Case,
    MakeDispatcher,
    cases,
    check_coding_changes_no_bit,
    check_cut_at_exchanges,
    check_fp8_parity,
    check_parity,
    choices,
    fp8_cases,
    held_after_dispatch,
    traffic,
)

BF16 = 2e-2


def maker(num_nodes: int, places: int, *, fp8: bool = False) -> MakeDispatcher:
    """Create the groups of nodes x places processes; return how to make a dispatcher for them."""
    across = [[node * places + place for node in range(num_nodes)] for place in range(places)]
    inside = [[node * places + place for place in range(places)] for node in range(num_nodes)]
    handles = {tuple(ranks): dist.new_group(ranks) for ranks in across + inside if len(ranks) > 1}

    def make(rank: int, recompute: Recompute, trace: Trace) -> TwoHopDispatcher:
        def group(name: str, families: list[list[int]]) -> Group:
            (ranks,) = [ranks for ranks in families if rank in ranks]
            handle: Any = handles.get(tuple(ranks))
            return Group(name, ranks, rank=ranks.index(rank), handle=handle, trace=trace)

        hops = (group("inter", across), group("intra", inside))
        return TwoHopDispatcher(*hops, NUM_EXPERTS, recompute, fp8=fp8)

    return make


def two_nodes_of_two(rank: int) -> None:
    make = maker(2, 2)
    tokens = (7, 0, 4, 9)
    for case in (Case(tokens), Case(tokens, favoured=(0, 1, 2, 3)), Case(tokens, recompute=Recompute.full)):
        check_bytes(case, rank, 2, 2)
    # four nodes coincide with the four groups of experts, of which a token may choose two
    check_bytes(Case(tokens), rank, 4, 1)
    for case in cases(tokens, (0, 0, 6, 0), (0, 0, 0, 0)):
        check_parity(case, rank, make)
    check_fp8(rank, tokens, make, maker(2, 2, fp8=True))
    check_bytes(replace(Case(tokens), dtype=torch.bfloat16, hidden=256), rank, 2, 2)
    check_bytes(replace(Case(tokens), dtype=torch.bfloat16, hidden=256, fp8=True), rank, 2, 2)


def check_fp8(rank: int, tokens: tuple[int, ...], numbers: MakeDispatcher, codes: MakeDispatcher) -> None:
    for case in fp8_cases(tokens, (0,) * (len(tokens) - 1) + (6,)):
        check_coding_changes_no_bit(case, rank, numbers, codes)
        # in BF16 the sums of a token's rows are rounded on each hop, as they are without FP8
        check_fp8_parity(replace(case, tolerance=BF16) if case.dtype is torch.bfloat16 else case, rank, codes)


def one_node_or_one_place(rank: int) -> None:
    for make, case in product((maker(1, 2), maker(2, 1)), cases((7, 4), (0, 5))):
        check_parity(case, rank, make)
    for nodes, places in ((1, 2), (2, 1)):
        check_fp8(rank, (70, 40), maker(nodes, places), maker(nodes, places, fp8=True))


@pytest.mark.parametrize(("world_size", "check"), [(4, two_nodes_of_two), (2, one_node_or_one_place)])
def test_spreading_the_experts_changes_nothing(world_size: int, check: Callable[[int], None]) -> None:
    run_ranks(world_size, check)


def check_bytes(case: Case, rank: int, num_nodes: int, places: int) -> None:
    """Every exchange has exactly the rows that the routing of all processes calls for."""
    node, place = divmod(rank, places)
    everyone = choices(case)
    per_process = NUM_EXPERTS // (num_nodes * places)

    def processes(chosen: set[int]) -> set[int]:
        return {expert // per_process for expert in chosen}

    def nodes(chosen: set[int]) -> set[int]:
        return {process // places for process in processes(chosen)}

    own = everyone[rank]
    sent_inter = sum(len(nodes(chosen)) for chosen in own)
    assert sent_inter <= min(CONFIG.moe.top_k_groups, num_nodes) * len(own)
    assert not own or sent_inter < TOP_K * len(own)
    peers = [chosen for other in range(place, len(everyone), places) for chosen in everyone[other]]
    here = [chosen for chosen in peers if node in nodes(chosen)]
    sent_intra = sum(process // places == node for chosen in here for process in processes(chosen))
    at_experts = sum(rank in processes(chosen) for tokens in everyone for chosen in tokens)

    back_row, labels, count = case.hidden * case.dtype.itemsize, TOP_K * 4, 8
    row = case.hidden + case.hidden // 128 if case.fp8 else back_row  # codes, and a scale for each 128
    counts = [("inter", num_nodes * (1 + places * (1 + per_process)) * count)]
    counts += [("intra", places * (1 + per_process) * count)]
    there = [("inter", sent_inter * row), *[("inter", sent_inter * labels)] * 2]
    there += [("intra", sent_intra * row), *[("intra", sent_intra * labels)] * 2]
    back = [("intra", at_experts * back_row), ("inter", len(here) * back_row)]
    gradients_there = [("inter", sent_inter * row), ("intra", sent_intra * row)]
    gradients_back = [("intra", at_experts * back_row), ("intra", at_experts * labels)]
    gradients_back += [("inter", len(here) * back_row), ("inter", len(here) * labels)]
    # full recomputation dispatches again when the experts' backward pass asks for their rows
    again = counts + there if case.recompute is Recompute.full else []
    expected = counts + there + back + gradients_there + again + gradients_back
    alone = {name for name, size in (("inter", num_nodes), ("intra", places)) if size == 1}
    crossing = [call for call in expected if call[0] not in alone]
    assert traffic(case, rank, maker(num_nodes, places, fp8=case.fp8)) == crossing


def test_a_token_travels_as_one_row_to_all_its_experts_behind_a_member() -> None:
    inter, intra = Group("inter"), Group("intra")
    dispatcher = TwoHopDispatcher(inter, intra, NUM_EXPERTS)
    steps = dispatcher.dispatch_steps(torch.arange(6.0).view(3, 2), routing([[0, 3], [7, 2], [4, 5]]))
    first = next(steps)
    assert (first.group, first.sent) == (inter, [3])  # 3 tokens, 6 choices
    second = steps.send(first.tensors)
    assert (second.group, second.sent) == (intra, [3])
    with pytest.raises(StopIteration) as end:
        steps.send(second.tensors)
    dispatched = end.value.value
    assert dispatched.counts == [1, 0, 1, 1, 1, 1, 0, 1]
    assert dispatched.rows_RD[:, 0].tolist() == [0, 2, 0, 4, 4, 2]
    combined_TD = dispatcher.combine(dispatched.rows_RD, dispatched)
    assert combined_TD[:, 0].tolist() == [0, 4, 8]


def test_bf16_rows_are_summed_in_fp32() -> None:
    """256 + 1 + 1 is 258 in FP32 but 256 when every partial sum is rounded to BF16."""
    dispatcher = TwoHopDispatcher(Group("inter"), Group("intra"), NUM_EXPERTS)
    dispatched = dispatcher.dispatch(torch.zeros(1, 4, dtype=torch.bfloat16), routing([[1, 4, 6]]))
    rows_RD = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)[:, None].expand(3, 4)
    combined_TD = dispatcher.combine(rows_RD, dispatched)
    assert combined_TD.dtype == torch.bfloat16
    assert combined_TD.eq(258).all()


def routing(indices: list[list[int]]) -> Routing:
    indices_TA = torch.tensor(indices)
    load_E = torch.bincount(indices_TA.flatten(), minlength=NUM_EXPERTS)
    return Routing(indices_TA, torch.rand(indices_TA.shape), load_E, torch.zeros(()))


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.deepseek])
def test_copies_are_kept_only_where_nothing_is_recomputed(recompute: Recompute) -> None:
    dispatcher = TwoHopDispatcher(Group("inter"), Group("intra"), NUM_EXPERTS, recompute)
    held, num_bytes = held_after_dispatch(dispatcher, recompute)
    assert (held < num_bytes / 4) == (recompute is Recompute.deepseek), (held, num_bytes)


def test_only_exchanged_tensors_lead_back() -> None:
    for fp8 in (False, True):
        dispatcher = TwoHopDispatcher(Group("inter"), Group("intra"), NUM_EXPERTS, fp8=fp8)
        check_cut_at_exchanges(dispatcher, exchanges=4, fp8=fp8)


def test_experts_must_divide_evenly() -> None:
    with pytest.raises(ValueError, match="8 experts cannot be divided evenly among 6 processes"):
        TwoHopDispatcher(Group("inter", range(3)), Group("intra", range(2)), NUM_EXPERTS)
