"""Collectives against closed forms, and what the trace says of them."""

import torch
import torch.distributed as dist

from parallel.groups import CollectiveCall, Group, Trace
from tests.distributed import run_ranks

WORLD = 3


def rows_of(rank: int, count: int = 3) -> torch.Tensor:
    """Rows that say whose they are: 10 * rank + row."""
    return (10.0 * rank + torch.arange(count))[:, None].expand(count, 2).contiguous()


def every_operation(rank: int) -> dict[str, torch.Tensor]:
    trace = Trace()
    group = Group("world", range(WORLD), rank=rank, trace=trace)
    calls: list[CollectiveCall] = []
    trace.listeners.append(calls.append)
    x = rows_of(rank)
    flat = torch.zeros(WORLD, 2)
    flat[rank] = rank + 1
    sent = [(rank + other) % 3 for other in range(WORLD)]
    received = [(other + rank) % 3 for other in range(WORLD)]
    into = torch.empty(3, 2)
    outgoing = group.start_send(x, (rank + 1) % WORLD)
    group.start_receive(into, (rank - 1) % WORLD).wait()
    outgoing.wait()
    results = {
        "sum": group.all_reduce(x.clone()),
        "max": group.all_reduce(x.clone(), op=dist.ReduceOp.MAX),
        "gathered": group.all_gather(x),
        "in place": group.start_all_gather(flat[rank : rank + 1], out=flat).wait(),
        "scattered": group.reduce_scatter(x),
        "exchanged": group.all_to_all(x),
        "uneven": group.all_to_all(rows_of(rank, sum(sent)), received, sent),
        "from the left": into,
    }
    group.barrier()
    assert trace.under_way == []
    assert all(call.ended is not None and call.ended >= call.started for call in calls)
    heard = [f"{call.operation} {call.group} {call.num_bytes}" for call in calls]
    assert heard[0] == "send world 24"
    assert "all_to_all world 24" in heard
    return results


def test_every_operation_equals_its_closed_form() -> None:
    for rank, got in enumerate(run_ranks(WORLD, every_operation)):
        everybody = torch.cat([rows_of(other) for other in range(WORLD)])
        assert torch.equal(got["sum"], rows_of(0) * WORLD + 10 * 3)
        assert torch.equal(got["max"], rows_of(WORLD - 1))
        assert torch.equal(got["gathered"], everybody)
        assert torch.equal(got["in place"], torch.arange(1.0, 4)[:, None].expand(3, 2))
        assert torch.equal(got["scattered"], got["sum"][rank : rank + 1])
        assert got["exchanged"][:, 0].tolist() == [10.0 * other + rank for other in range(WORLD)]
        assert torch.equal(got["from the left"], rows_of((rank - 1) % WORLD))
        expected = []
        for other in range(WORLD):
            counts = [(other + to) % 3 for to in range(WORLD)]
            start = sum(counts[:rank])
            expected += [10.0 * other + start + i for i in range(counts[rank])]
        assert got["uneven"][:, 0].tolist() == expected


def test_a_group_of_one_is_the_identity() -> None:
    group, x = Group("dp"), rows_of(1)
    for same in (group.all_reduce(x), group.all_gather(x), group.reduce_scatter(x), group.all_to_all(x)):
        assert same is x
    flat = torch.zeros(3, 2)
    assert torch.equal(group.start_all_gather(x, out=flat).wait(), x)
    group.barrier()
    assert group.trace.under_way == []
