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
from parallel.wire import Trip, Way, decode, encode
from tests.distributed import run_ranks

SENT = [[1, 3], [2, 0]]  # SENT[source][destination] rows
EMPTY = [[0, 0], [0, 0]]


def group_of_two(rank: int) -> tuple[Group, Trace]:
    trace = Trace()
    return Group("ep", range(2), rank=rank, handle=dist.group.WORLD, trace=trace), trace


def splits(table: list[list[int]], rank: int) -> tuple[list[int], list[int]]:
    """Return the rows received from, and sent to, each process."""
    return [row[rank] for row in table], table[rank]


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
            arrived = perform(Exchange(sent, *splits(table, rank), group))
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
    arrived = perform(Exchange((x_R3, weights_R, x_R3.detach().int()), *splits(SENT, rank), group))
    assert under_way == [1, 2, 3]
    (arrived[0].sum() + arrived[1].sum()).backward()
    assert under_way == [1, 2, 3, 1, 2]  # integers do not travel back
    assert trace.under_way == []


def check_unused_rows_still_travel_back(rank: int) -> None:
    """A process that makes nothing of some rows takes part in their way back: others wait for it."""
    group, _ = group_of_two(rank)
    x_R3 = rows(SENT, rank).requires_grad_()
    weights_R = rows(SENT, rank).sum(1).requires_grad_()
    arrived = perform(Exchange((x_R3, weights_R), *splits(SENT, rank), group))
    arrived[rank].sum().backward()
    destination_R = rows(SENT, rank)[:, 1]
    assert torch.equal(gradient(x_R3), (destination_R == 0).float()[:, None].expand(-1, 3))
    assert torch.equal(gradient(weights_R), (destination_R == 1).float())


def check_trips(rank: int) -> None:
    """Codes there, codes back, and a shape that lends its gradient; splits with and without rows."""
    group, trace = group_of_two(rank)
    calls: list[int] = []
    trace.listeners.append(lambda call: calls.append(call.num_bytes))
    trips = (Trip(there=Way.codes), Trip(back=Way.codes), Trip(there=Way.shape))
    generator = torch.Generator().manual_seed(rank)
    for table in (SENT, EMPTY, [[0, 3], [0, 0]]):
        calls.clear()
        num_rows, num_back = sum(table[rank]), sum(row[rank] for row in table)
        sent = [torch.randn(num_rows, 200, generator=generator).bfloat16().requires_grad_() for _ in trips]
        labels_R = torch.arange(num_rows)
        ways = splits(table, rank)
        arrived = perform(Exchange((*sent, labels_R), *ways, group, trips))
        assert [tuple(x.shape) for x in arrived] == [(num_back, 200)] * 3 + [(num_back,)]
        assert [x.requires_grad for x in arrived] == [True, True, True, False]
        assert not arrived[2].any()
        coded, plain = 200 + 2, 400
        assert calls == [num_rows * size for size in (coded, plain, 8)]
        calls.clear()
        grads = [torch.randn(num_back, 200, generator=generator).bfloat16() for _ in trips]
        torch.autograd.backward(arrived[:3], grads)
        assert calls == [num_back * size for size in (plain, coded, plain)]
        there = Exchange(tuple(x.detach() for x in sent), *ways, group)
        expected = perform(there)
        assert torch.equal(arrived[0], decode(encode(expected[0]), torch.bfloat16))
        assert torch.equal(arrived[1], expected[1])
        returned = perform(there.returning(grads))
        assert torch.equal(gradient(sent[0]), returned[0])
        assert torch.equal(gradient(sent[1]), decode(encode(returned[1]), torch.bfloat16))
        assert torch.equal(gradient(sent[2]), returned[2])
        assert trace.under_way == []


def check_gradients_follow_who_wants_them(rank: int) -> None:
    """A tensor without gradient takes no part in the way back; those behind it keep their trips."""
    group, _ = group_of_two(rank)
    trips = (Trip(back=Way.shape), Trip(back=Way.codes))
    frozen_R3, wanted_R3 = rows(SENT, rank), rows(SENT, rank).requires_grad_()
    ways = splits(SENT, rank)
    exchange = Exchange((frozen_R3, wanted_R3), *ways, group, trips)
    assert exchange.gradients().trips == (Trip(there=Way.codes),)
    arrived = perform(exchange)
    (arrived[1] * 1.0625).sum().backward()  # halfway between two codes: to the even one, 1
    assert gradient(wanted_R3).eq(1).all()


def check_nothing_sent_is_kept(rank: int) -> None:
    group, _ = group_of_two(rank)
    x_R3 = rows(SENT, rank).requires_grad_()

    def steps() -> Steps[Tensor]:
        there = Exchange((), *splits(SENT, rank), group)
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
    check_trips(rank)
    check_gradients_follow_who_wants_them(rank)
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
