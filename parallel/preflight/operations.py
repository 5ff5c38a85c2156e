"""Collectives whose results are known beforehand, so that a run of one shows whether its values are right.

The process at place p of a group of N fills its buffer with v(p, i) = (i + 3 p) mod 8 at index i. Sums over
places stay below 2^24 for two million processes, so every result is exact in FP32 whatever the order:

    all_reduce       sum over p of v(p, i)
    reduce_scatter   the same, this place's part of it
    all_gather       v(p, .) for each p, one part after the other
    all_to_all       part q of the result is what place q had for this one
    relay            v(0, .) + r at place r: from place to place down the line, each adding 1, and back up

`parts` are the pieces of a result that each come from one place: a wrong value there names its sender. The
bandwidths are those of nccl-tests: `algbw`, bytes of the whole buffer a second, and `busbw`, which multiplies
it by what the best algorithm sends over a link, so that sizes of groups and operations can be compared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.groups import Group

PERIOD, STRIDE = 8, 3
ELEMENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One collective, over a buffer of a number of elements that the size N of the group divides.

    parts: whether the result falls into one part for each place, in order. share: bytes that a rank of N
    sends for each byte of the whole buffer. prepare: fills a buffer of this place, and returns what does the
    work and gives the result. expected: the result that this place must get.
    """

    parts: bool
    share: Callable[[int], float]
    prepare: Callable[[Group, int, torch.device], Callable[[], Tensor]]
    expected: Callable[[Group, int, torch.device], Tensor]


def values(place: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return v(place, i) for i = first, …, first + count - 1; FP32 [count]."""
    index = torch.arange(first, first + count, device=device)
    return ((index + STRIDE * place) % PERIOD).float()


def whole_buffer(group: Group, num_bytes: int) -> int:
    """Return the number of elements of about num_bytes that the group divides."""
    return max(1, num_bytes // ELEMENT_BYTES // group.size) * group.size


def wrong_parts(
    operation: Operation, result: Tensor, expected: Tensor, group: Group
) -> tuple[int, list[int]]:
    """Return how many elements of a result are wrong, and the global ranks that sent them, where known."""
    wrong = result != expected
    if not operation.parts:
        return int(wrong.sum()), []
    by_sender = wrong.view(group.size, -1).sum(1).tolist()
    senders = [rank for rank, count in zip(group.ranks, by_sender, strict=True) if count]
    return sum(by_sender), senders


def _summed(group: Group, first: int, count: int, device: torch.device) -> Tensor:
    total = torch.zeros(count, device=device)
    for residue in range(PERIOD):  # places that differ by a multiple of the period have the same values
        places = len(range(residue, group.size, PERIOD))
        total += places * values(residue, first, count, device)
    return total


def _all_reduce(group: Group, count: int, device: torch.device) -> Callable[[], Tensor]:
    source = values(group.rank, 0, count, device)
    buffer = torch.empty_like(source)
    return lambda: group.all_reduce(buffer.copy_(source))


def _reduce_scatter(group: Group, count: int, device: torch.device) -> Callable[[], Tensor]:
    buffer = values(group.rank, 0, count, device)
    return lambda: group.reduce_scatter(buffer)


def _all_gather(group: Group, count: int, device: torch.device) -> Callable[[], Tensor]:
    buffer = values(group.rank, 0, count // group.size, device)
    return lambda: group.all_gather(buffer)


def _all_to_all(group: Group, count: int, device: torch.device) -> Callable[[], Tensor]:
    buffer = values(group.rank, 0, count, device)
    return lambda: group.all_to_all(buffer)


def _relay(group: Group, count: int, device: torch.device) -> Callable[[], Tensor]:
    source = values(0, 0, count, device)
    buffer = torch.empty_like(source)

    def work() -> Tensor:
        if group.rank == 0:
            buffer.copy_(source)
        else:
            group.start_receive(buffer, group.rank - 1).wait()
            buffer.add_(1)
        if group.rank + 1 < group.size:
            group.start_send(buffer, group.rank + 1).wait()
            returned = torch.empty_like(buffer)
            group.start_receive(returned, group.rank + 1).wait()
            buffer.copy_(returned.sub_(1))
        if group.rank > 0:
            group.start_send(buffer, group.rank - 1).wait()
        return buffer

    return work


def _own_part(group: Group, count: int) -> tuple[int, int]:
    part = count // group.size
    return group.rank * part, part


OPERATIONS = {
    "all_reduce": Operation(
        parts=False,
        share=lambda size: 2 * (size - 1) / size,
        prepare=_all_reduce,
        expected=lambda group, count, device: _summed(group, 0, count, device),
    ),
    "reduce_scatter": Operation(
        parts=False,
        share=lambda size: (size - 1) / size,
        prepare=_reduce_scatter,
        expected=lambda group, count, device: _summed(group, *_own_part(group, count), device),
    ),
    "all_gather": Operation(
        parts=True,
        share=lambda size: (size - 1) / size,
        prepare=_all_gather,
        expected=lambda group, count, device: torch.cat(
            [values(place, 0, count // group.size, device) for place in range(group.size)]
        ),
    ),
    "all_to_all": Operation(
        parts=True,
        share=lambda size: (size - 1) / size,
        prepare=_all_to_all,
        expected=lambda group, count, device: torch.cat(
            [values(place, *_own_part(group, count), device) for place in range(group.size)]
        ),
    ),
    "relay": Operation(
        parts=False,
        share=lambda size: 2 * (size - 1),
        prepare=_relay,
        expected=lambda group, count, device: values(0, 0, count, device) + group.rank,
    ),
}
