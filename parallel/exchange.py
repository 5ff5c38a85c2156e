"""Computations that pause at every exchange of rows, so that whoever drives them decides how to wait.

Sending tokens to experts is arithmetic with a few all-to-alls in between. It is written once, as a generator:
it yields an `Exchange`, is resumed with the rows that arrived, and returns its result. `run` is the plain
driver; a schedule that hides communication drives the same generator and computes something else between
starting an exchange and waiting for it.

    def doubled_steps(x_RD, group) -> Steps[Tensor]:
        (arrived_RD,) = yield Exchange((x_RD,), received=[2, 1], sent=[1, 2], group=group)
        return 2 * arrived_RD

A tensor need not travel as it is: `trips` say which ones are sent as FP8 codes, there or back, and which only
lend their shape (parallel/wire.py). Coding is part of the exchange, so drivers need not know.

A driver may cut autograd's graph at an exchange and differentiate the pieces one after the other. Hence the
rule for writing steps: after a `yield`, nothing that came before may be used in a differentiable way; what
the gradient must reach travels as one of the tensors. Integer tensors and Python numbers may be kept.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.groups import Group, Pending
from parallel.wire import Trip, Way, decode, encode, shell

T = TypeVar("T")


class Arriving(Protocol):
    """A tensor under way."""

    def wait(self) -> Tensor:
        """Return the tensor when it is complete; may be called once."""
        ...


class _Coded:
    """A tensor under way as bytes, decoded when they are complete."""

    def __init__(self, pending: Pending, dtype: torch.dtype) -> None:
        self._pending, self._dtype = pending, dtype

    def wait(self) -> Tensor:
        return decode(self._pending.wait(), self._dtype)


class Exchange(NamedTuple):
    """Rows (the first dimension) of several tensors to be sent, all with the same splits.

    tensors: in order of the process they go to. The gradients of those that require one travel back, which
    must be the same ones on all processes; integers ride along.
    received, sent: rows that come from and go to each process of `group`, in rank order.
    trips: how the first tensors travel, the others as numbers.
    """

    tensors: tuple[Tensor, ...]
    received: list[int]
    sent: list[int]
    group: Group
    trips: tuple[Trip, ...] = ()

    def start(self) -> list[Arriving]:
        """Start sending every tensor; results in the order of `tensors`. Autograd does not see it."""
        others = (Trip(),) * (len(self.tensors) - len(self.trips))
        pairs = zip(self.tensors, self.trips + others, strict=True)
        return [self._start(x, trip.there) for x, trip in pairs]

    def returning(self, tensors: Sequence[Tensor]) -> "Exchange":
        """Return the exchange that brings rows like those that arrived back to where they came from."""
        return Exchange(tuple(tensors), received=self.sent, sent=self.received, group=self.group)

    def gradients(self) -> "Exchange":
        """Return the exchange, yet without tensors, for the gradients of those that require one."""
        pairs = zip(self.tensors, self.trips, strict=False)
        return self.returning(())._replace(trips=tuple(trip.turned() for x, trip in pairs if x.requires_grad))

    def _start(self, x: Tensor, way: Way) -> Arriving:
        if self.group.size == 1:
            return Pending(x)
        if way is Way.shape:
            return Pending(shell(sum(self.received), like=x))
        if way is Way.codes:
            return _Coded(self.group.start_all_to_all(encode(x), self.received, self.sent), x.dtype)
        return self.group.start_all_to_all(x, self.received, self.sent)


Steps = Generator[Exchange, tuple[Tensor, ...], T]
"""A computation in steps: yields exchanges, is sent what arrived, returns a T."""


def run(steps: Steps[T]) -> T:
    """Run a computation to its end, waiting for each exchange on the spot; differentiable throughout."""
    try:
        arrived = perform(next(steps))
        while True:
            arrived = perform(steps.send(arrived))
    except StopIteration as end:
        return end.value


def perform(exchange: Exchange) -> tuple[Tensor, ...]:
    """Return the rows that arrive, in rank order of their senders, tensor by tensor.

    All tensors are under way at the same time. The gradient is the returning exchange of the gradients.
    """
    if exchange.group.size == 1:
        return exchange.tensors
    there = exchange._replace(tensors=())
    arrived: Any = _Exchange.apply(there, exchange.gradients(), *exchange.tensors)
    return arrived


class _Exchange(torch.autograd.Function):
    """Takes both ways without tensors: a context that held what was sent would keep it in memory."""

    @staticmethod
    def forward(ctx: Any, there: Exchange, back: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        arrived = _wait(there._replace(tensors=tensors))
        wanted = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(x for x, want in zip(arrived, wanted, strict=True) if not want))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        back = ctx.back._replace(tensors=tuple(g for g, want in zip(grads, wanted, strict=True) if want))
        arrived = iter(_wait(back))
        return None, None, *(next(arrived) if want else None for want in wanted)


def _wait(exchange: Exchange) -> tuple[Tensor, ...]:
    return tuple(pending.wait() for pending in exchange.start())
