"""Each collective's gradient, against the same computation on all processes' values in one."""

import torch
from torch import Tensor

from parallel.collectives import all_gather_rows, exchange, gather_tokens, reduce_scatter_rows, scatter_tokens
from parallel.groups import Group
from tests.distributed import run_ranks

WORLD = 2


def value(rank: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def weight(rank: int, *shape: int) -> Tensor:
    """What the result is multiplied with, so that its gradient differs by rank and place."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(50 + rank))


def on_a_rank(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    group = Group("world", range(WORLD), rank=rank)
    results = {}
    for name, operation, shape in (
        ("gather", all_gather_rows, (2, 3)),
        ("scatter", reduce_scatter_rows, (4, 3)),
        ("gather tokens", gather_tokens, (2, 3, 5)),
        ("scatter tokens", scatter_tokens, (2, 6, 5)),
    ):
        x = value(rank, *shape)
        y = operation(x, group)
        (y * weight(rank, *y.shape)).sum().backward()
        assert x.grad is not None
        results[name] = (y.detach(), x.grad)
    sent, received = ([1, 3], [1, 0]) if rank == 0 else ([0, 2], [3, 2])
    x = value(rank, sum(sent), 3)
    y = exchange(x, group, received, sent)
    (y * weight(rank, *y.shape)).sum().backward()
    assert x.grad is not None
    results["exchange"] = (y.detach(), x.grad)
    return results


def test_values_and_gradients_equal_one_process() -> None:
    got = run_ranks(WORLD, on_a_rank)

    def check(name: str, xs: list[Tensor], ys: list[Tensor]) -> None:
        sum((y * weight(rank, *y.shape)).sum() for rank, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        for rank, (x, y) in enumerate(zip(xs, ys, strict=True)):
            torch.testing.assert_close(got[rank][name][0], y.detach(), msg=name)
            torch.testing.assert_close(got[rank][name][1], x.grad, msg=name)

    xs = [value(rank, 2, 3) for rank in range(WORLD)]
    check("gather", xs, [torch.cat(xs)] * WORLD)
    xs = [value(rank, 4, 3) for rank in range(WORLD)]
    check("scatter", xs, list((xs[0] + xs[1]).chunk(WORLD)))
    xs = [value(rank, 2, 3, 5) for rank in range(WORLD)]
    check("gather tokens", xs, [torch.cat(xs, 1)] * WORLD)
    xs = [value(rank, 2, 6, 5) for rank in range(WORLD)]
    check("scatter tokens", xs, list((xs[0] + xs[1]).chunk(WORLD, 1)))
    xs = [value(0, 4, 3), value(1, 2, 3)]
    check("exchange", xs, [xs[0][:1], torch.cat([xs[0][1:], xs[1]])])
