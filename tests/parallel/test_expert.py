"""One all-to-all there and back: nothing changes but where experts live; bytes as announced."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import Recompute
from model.router import Routing
from parallel.exchange import Exchange
from parallel.expert import AllToAllDispatcher
from parallel.groups import Group, Trace
from tests.distributed import run_ranks
from tests.parallel.dispatch_parity import (
    HIDDEN,
    NUM_EXPERTS,
    TOP_K,
    Case,
    cases,
    check_coding_changes_no_bit,
    check_cut_at_exchanges,
    check_fp8_parity,
    check_parity,
    choices,
    fp8_cases,
    held,
    held_after_dispatch,
    traffic,
)


def make(rank: int, recompute: Recompute, trace: Trace, *, fp8: bool = False) -> AllToAllDispatcher:
    size = dist.get_world_size()
    group = Group("ep", range(size), rank=rank, handle=dist.group.WORLD, trace=trace)
    return AllToAllDispatcher(group, NUM_EXPERTS, recompute, fp8=fp8)


make_fp8 = partial(make, fp8=True)


def two_processes(rank: int) -> None:
    check_bytes(Case((7, 4)), rank)
    check_order(rank, 2)
    for case in cases((7, 4), (0, 5), (5, 0), (0, 0)):
        check_parity(case, rank, make)
    check_fp8_bytes(rank, (7, 4))
    for case in fp8_cases((70, 40), (0, 5), (0, 0)):
        check_coding_changes_no_bit(case, rank, make, make_fp8)
        check_fp8_parity(case, rank, make_fp8)


def four_processes(rank: int) -> None:
    tokens = (7, 0, 4, 9)
    check_bytes(Case(tokens), rank)
    check_bytes(Case(tokens, favoured=(0, 1, 2, 3)), rank)
    check_order(rank, 4)
    for case in cases(tokens, (0, 0, 6, 0)):
        check_parity(case, rank, make)
    check_fp8_bytes(rank, tokens)
    for case in fp8_cases(tokens, (0, 0, 6, 0)):
        check_coding_changes_no_bit(case, rank, make, make_fp8)
        check_fp8_parity(case, rank, make_fp8)


@pytest.mark.parametrize(("world_size", "check"), [(2, two_processes), (4, four_processes)])
def test_spreading_the_experts_changes_nothing(world_size: int, check: Callable[[int], None]) -> None:
    run_ranks(world_size, check)


def check_bytes(case: Case, rank: int) -> None:
    """Counts, then rows and weights together, then rows back; the gradients of these in reverse."""
    row = HIDDEN * 4
    assert traffic(case, rank, make) == expected_bytes(case, rank, there=row, back=row)


def check_fp8_bytes(rank: int, tokens: tuple[int, ...]) -> None:
    """The rows that leave, and gradients of those that come back: 129 bytes for 128 numbers of BF16."""
    case = Case(tokens, dtype=torch.bfloat16, hidden=256, fp8=True)
    assert traffic(case, rank, make) == expected_bytes(case, rank, there=512, back=512)
    assert traffic(case, rank, make_fp8) == expected_bytes(case, rank, there=2 * 129, back=512)


def expected_bytes(case: Case, rank: int, *, there: int, back: int) -> list[tuple[str, int]]:
    """there: bytes of a row to an expert and of the gradient of its output; back: of the other two."""
    sent = case.tokens[rank] * TOP_K
    mine = set(range(NUM_EXPERTS)[held(rank, len(case.tokens))])
    received = sum(len(mine & chosen) for tokens in choices(case) for chosen in tokens)
    weight, count = 4, 8
    forward = [count * NUM_EXPERTS, sent * there, sent * weight, received * back]
    backward = [sent * there, received * back, received * weight]
    return [("ep", num_bytes) for num_bytes in forward + backward]


def check_order(rank: int, world_size: int) -> None:
    """Rows lie by expert, then by source, then by token; each with the weight of its choice."""
    dispatcher = make(rank, Recompute.none, Trace())
    indices_TA = torch.tensor([[5, 0], [2, 5], [7, 2]])
    dispatched = dispatcher.dispatch(labels(rank), routing(rank, indices_TA))
    expected = [
        (source, token, source + token / 8 + choice / 64)
        for expert in range(NUM_EXPERTS)[held(rank, world_size)]
        for source, token, choice in product(range(world_size), range(3), range(2))
        if indices_TA[token, choice] == expert
    ]
    rows = torch.cat([dispatched.rows_RD, dispatched.row_weights_R[:, None]], 1)
    assert rows.tolist() == [list(row) for row in expected]


def labels(rank: int) -> Tensor:
    return torch.tensor([[rank, token] for token in range(3)], dtype=torch.float32)


def routing(rank: int, indices_TA: Tensor) -> Routing:
    weights_TA = rank + torch.arange(3)[:, None] / 8 + torch.arange(2) / 64
    load_E = torch.bincount(indices_TA.flatten(), minlength=NUM_EXPERTS)
    return Routing(indices_TA, weights_TA, load_E, torch.zeros(()))


def test_one_process_needs_no_torch_distributed() -> None:
    dispatcher = AllToAllDispatcher(Group("ep"), NUM_EXPERTS)
    dispatched = dispatcher.dispatch(labels(0), routing(0, torch.tensor([[5, 0], [2, 5], [7, 2]])))
    assert dispatched.counts == [1, 0, 2, 0, 0, 2, 0, 1]
    assert dispatched.rows_RD[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert dispatcher.combine(dispatched.rows_RD, dispatched)[:, 1].tolist() == [0, 2, 4]


def test_steps_pause_at_one_exchange_each_way() -> None:
    dispatcher = AllToAllDispatcher(Group("ep"), NUM_EXPERTS)
    steps = dispatcher.dispatch_steps(labels(0), routing(0, torch.tensor([[5, 0], [2, 5], [7, 2]])))
    exchange = next(steps)
    assert isinstance(exchange, Exchange)
    assert (exchange.sent, exchange.received) == ([6], [6])
    assert [tuple(x.shape) for x in exchange.tensors] == [(6, 2), (6,)]
    with pytest.raises(StopIteration) as end:
        steps.send(exchange.tensors)
    dispatched = end.value.value
    back = next(dispatcher.combine_steps(dispatched.rows_RD, dispatched))
    assert [tuple(x.shape) for x in back.tensors] == [(6, 2)]


def test_coded_rows_pause_at_the_same_exchanges() -> None:
    """Shell, bytes and weights leave; the shell asks for the gradient."""
    dispatcher = AllToAllDispatcher(Group("ep"), NUM_EXPERTS, fp8=True)
    x_TD = torch.randn(3, 200, requires_grad=True)
    exchange = next(dispatcher.dispatch_steps(x_TD, routing(0, torch.tensor([[5, 0], [2, 5], [7, 2]]))))
    assert [tuple(x.shape) for x in exchange.tensors] == [(6, 200), (6, 202), (6,)]
    assert [x.requires_grad for x in exchange.tensors] == [True, False, False]
    assert exchange.tensors[0].untyped_storage().nbytes() == 4


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.deepseek])
def test_copies_are_kept_only_where_nothing_is_recomputed(recompute: Recompute) -> None:
    dispatcher = AllToAllDispatcher(Group("ep"), NUM_EXPERTS, recompute)
    held, num_bytes = held_after_dispatch(dispatcher, recompute)
    assert (held < num_bytes / 4) == (recompute is Recompute.deepseek), (held, num_bytes)


def test_only_exchanged_tensors_lead_back() -> None:
    for fp8 in (False, True):
        dispatcher = AllToAllDispatcher(Group("ep"), NUM_EXPERTS, fp8=fp8)
        check_cut_at_exchanges(dispatcher, exchanges=2, fp8=fp8)


def test_experts_must_divide_evenly() -> None:
    with pytest.raises(ValueError, match="8 experts cannot be divided evenly among 3 processes"):
        AllToAllDispatcher(Group("ep", range(3)), NUM_EXPERTS)
