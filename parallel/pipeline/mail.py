"""What travels between stages: hidden states forwards, their gradients backwards.

Shapes are known to both sides, so nothing is announced. Two stages of one rank hand over directly. Between
two ranks messages arrive in the order in which they were sent, and a table lists sends and receives alike.

Legend: B sequences of the microbatch, s tokens of a sequence on this rank, D hidden.
"""

from collections import deque
from enum import Enum

from torch import Tensor

from parallel.groups import Group, Pending

SENDS_UNDER_WAY = 4
"""Sent tensors are kept until they have left; more than this many, and the oldest is waited for."""


class Way(Enum):
    """forward: hidden states, to the next stage; backward: their gradients, to the stage before."""

    forward = 1
    backward = -1


class Mail:
    """The letters of one step on one rank.

    A stage's result is `put`. Where the neighbour is on another rank, the table then says when to `send` it
    and when the neighbour's rank must `receive`. `take` waits for what arrives.

    Args:
        pp: the ranks of the pipeline.
        stage_to_rank: who holds each stage.
    """

    def __init__(self, pp: Group, stage_to_rank: tuple[int, ...]) -> None:
        self._pp, self._stage_to_rank = pp, stage_to_rank
        self._arrivals: dict[tuple[Way, int, int], Pending] = {}
        self._outgoing: dict[tuple[Way, int, int], Tensor] = {}
        self._sent: deque[Pending] = deque()

    def put(self, way: Way, stage: int, microbatch: int, x_BsD: Tensor) -> None:
        """Hand over what `stage` computed for its neighbour."""
        neighbour = stage + way.value
        if self._stage_to_rank[neighbour] == self._pp.rank:
            self._arrivals[way, neighbour, microbatch] = Pending(x_BsD)
        else:
            self._outgoing[way, stage, microbatch] = x_BsD

    def send(self, way: Way, stage: int, microbatch: int) -> None:
        """Send what `stage` has put."""
        x_BsD = self._outgoing.pop((way, stage, microbatch))
        self._sent.append(self._pp.start_send(x_BsD, self._stage_to_rank[stage + way.value]))
        while len(self._sent) > SENDS_UNDER_WAY:
            self._sent.popleft().wait()

    def receive(self, way: Way, stage: int, microbatch: int, *, into: Tensor) -> None:
        """Start receiving what the neighbour of `stage` sends to it."""
        source = self._stage_to_rank[stage - way.value]
        self._arrivals[way, stage, microbatch] = self._pp.start_receive(into, source)

    def take(self, way: Way, stage: int, microbatch: int) -> Tensor:
        """Return what `stage` is to work on, when it has arrived."""
        return self._arrivals.pop((way, stage, microbatch)).wait()

    def close(self) -> None:
        """Wait for all sends."""
        while self._sent:
            self._sent.popleft().wait()
