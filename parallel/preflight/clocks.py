"""How far the clocks of a job's machines are apart, by asking them (Cristian's method, as NTP uses it).

Rank 0 sends a message to a peer at t0 of its own clock; the peer answers with its time t; the answer arrives
at t1. If both ways took as long, the peer's clock is ahead of rank 0's by

    offset = t - (t0 + t1) / 2,      wrong by at most (t1 - t0) / 2.

Of ROUNDS questions the one with the fastest answer is kept: its bound is the tightest.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parallel.groups import Group

ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Offset:
    """By how much the clock of `rank` is ahead of that of rank 0, known within `error_s`."""

    rank: int
    seconds: float
    error_s: float


def clock_offsets(
    world: Group, peers: Sequence[int], *, clock: Callable[[], float] = time.time
) -> list[Offset]:
    """Return an offset for each of `peers`, on rank 0; nothing on other ranks.

    Args:
        world: all processes, which call this together.
        peers: ranks to ask, one for each machine is enough; not rank 0. The same on every process.
        clock: seconds since a moment that all machines agree on.
    """
    if world.rank in peers:
        _answer(world, clock)
    return [_ask(world, peer, clock) for peer in peers] if world.rank == 0 else []


def _ask(world: Group, peer: int, clock: Callable[[], float]) -> Offset:
    question, answer = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    best: Offset | None = None
    for _ in range(ROUNDS):
        sent = clock()
        world.start_send(question, peer).wait()
        world.start_receive(answer, peer).wait()
        arrived = clock()
        error_s = (arrived - sent) / 2
        if best is None or error_s < best.error_s:
            best = Offset(rank=peer, seconds=answer.item() - (sent + arrived) / 2, error_s=error_s)
    assert best is not None
    return best


def _answer(world: Group, clock: Callable[[], float]) -> None:
    question = torch.zeros(1)
    for _ in range(ROUNDS):
        world.start_receive(question, 0).wait()
        world.start_send(torch.tensor([clock()], dtype=torch.float64), 0).wait()
