"""Steps that pause at exchanges: values and gradients, what is under way together, what is kept."""

import time
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.exchange import Exchange, Steps, perform, run
from parallel.groups import Group, Trace
from tests.distributed import run_ranks

SENT = [[1, 3], [2, 0]]  # SENT[source][destination] rows
EMPTY = [[0, 0], [0, 0]]


def group_of_two(rank: int) -> tuple[Group, Trace]:
    trace = Trace()
    return Group("ep", range(2), rank=rank, handle=dist.group.WORLD, trace=trace), trace


def splits(table: list[list[int]], rank: int) -> dict[str, list[int]]:
    return {"sent": table[rank], "received": [row[rank] for row in table]}


def rows(table: list[list[int]], source: int) -> Tensor:
    """Return rows [R, 3] that name their source and destination."""
    named = [(source, destination, i) for destination in range(2) for i in range(table[source][destination])]
    return torch.tensor(named, dtype=torch.float32).view(-1, 3)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def check_rows_and_gradients(rank: int) -> None:
    group, _ = group_of_two(rank)
    for table in (SENT, EMPTY):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x_R3 = rows(table, rank).to(dtype).requires_grad_()
            weights_R = rows(table, rank).sum(1).requires_grad_()
            labels_R = rows(table, rank).int()[:, 1]
            sent = (x_R3, weights_R, labels_R, rows(table, rank))
            arrived = perform(Exchange(sent, **splits(table, rank), group=group))
            expected_R3 = torch.cat(
                [rows(table, source)[rows(table, source)[:, 1] == rank] for source in (0, 1)]
            )
            expected = (expected_R3, expected_R3.sum(1), expected_R3[:, 1], expected_R3)
            for got, want, original in zip(arrived, expected, sent, strict=True):
                assert got.dtype == original.dtype
                assert torch.equal(got.double(), want.double())
            assert [y.requires_grad for y in arrived] == [True, True, False, False]
            # each process multiplies by its own factor, so gradients tell where a row went
            ((arrived[0].float() * (rank + 2)).sum() + (arrived[1] * (rank + 5)).sum()).backward()
            destination_R1 = rows(table, rank)[:, 1:2]
            assert torch.equal(gradient(x_R3).float(), (destination_R1 + 2).expand(-1, 3))
            assert torch.equal(gradient(weights_R), destination_R1[:, 0] + 5)


def check_tensors_travel_together(rank: int) -> None:
    """All tensors are under way before the first is waited for, there and back."""
    group, trace = group_of_two(rank)
    under_way: list[int] = []
    trace.listeners.append(lambda call: under_way.append(len(trace.under_way)))
    x_R3 = rows(SENT, rank).requires_grad_()
    weights_R = rows(SENT, rank).sum(1).requires_grad_()
    arrived = perform(Exchange((x_R3, weights_R, x_R3.detach().int()), **splits(SENT, rank), group=group))
    assert under_way == [1, 2, 3]
    (arrived[0].sum() + arrived[1].sum()).backward()
    assert under_way == [1, 2, 3, 1, 2]  # integers do not travel back
    assert trace.under_way == []


def check_unused_rows_still_travel_back(rank: int) -> None:
    """A process that makes nothing of some rows takes part in their way back: others wait for it."""
    group, _ = group_of_two(rank)
    x_R3 = rows(SENT, rank).requires_grad_()
    weights_R = rows(SENT, rank).sum(1).requires_grad_()
    arrived = perform(Exchange((x_R3, weights_R), **splits(SENT, rank), group=group))
    arrived[rank].sum().backward()
    destination_R = rows(SENT, rank)[:, 1]
    assert torch.equal(gradient(x_R3), (destination_R == 0).float()[:, None].expand(-1, 3))
    assert torch.equal(gradient(weights_R), (destination_R == 1).float())


def check_nothing_sent_is_kept(rank: int) -> None:
    group, _ = group_of_two(rank)
    x_R3 = rows(SENT, rank).requires_grad_()

    def steps() -> Steps[Tensor]:
        there = Exchange((), **splits(SENT, rank), group=group)
        (arrived_R3,) = yield there._replace(tensors=(track(x_R3 * 2),))
        freed()
        (back_R3,) = yield there.returning([track(arrived_R3 * 3)])
        freed()
        return back_R3

    track, freed = tracker()
    run(steps()).sum().backward()
    assert torch.equal(gradient(x_R3), torch.full_like(x_R3, 6))


def tracker() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    """Return how to watch a tensor's memory, and how to assert that all that was watched is freed."""
    watched: list[weakref.ref] = []

    def track(x: Tensor) -> Tensor:
        watched.append(weakref.ref(x.untyped_storage()))
        return x

    def freed() -> None:
        # gloo's own thread may hold what it sent for a fraction of a millisecond
        deadline = time.monotonic() + 5
        while any(reference() is not None for reference in watched):
            assert time.monotonic() < deadline

    return track, freed


def all_checks(rank: int) -> None:
    check_rows_and_gradients(rank)
    check_tensors_travel_together(rank)
    check_unused_rows_still_travel_back(rank)
    check_nothing_sent_is_kept(rank)


def test_two_processes() -> None:
    run_ranks(2, all_checks)


def test_a_group_of_one_keeps_the_graph() -> None:
    x_R3 = rows([[2, 0], [0, 0]], 0).requires_grad_()

    def steps() -> Steps[str]:
        (arrived,) = yield Exchange((x_R3,), [2], [2], Group("ep"))
        assert arrived is x_R3
        return "done"

    assert run(steps()) == "done"


def test_steps_without_an_exchange() -> None:
    def steps(pause: bool) -> Steps[int]:
        if pause:
            yield Exchange((), [], [], Group("ep"))
        return 3

    assert run(steps(False)) == run(steps(True)) == 3


def test_errors_in_steps_come_out() -> None:
    def steps() -> Steps[int]:
        yield Exchange((), [], [], Group("ep"))
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run(steps())
