"""Computations that pause at every exchange of rows, so that whoever drives them decides how to wait.

Sending tokens to experts is arithmetic with a few all-to-alls in between. It is written once, as a generator:
it yields an `Exchange`, is resumed with the rows that arrived, and returns its result. `run` is the plain
driver; a schedule that hides communication drives the same generator and computes something else between
starting an exchange and waiting for it.

    def doubled_steps(x_RD, group) -> Steps[Tensor]:
        (arrived_RD,) = yield Exchange((x_RD,), received=[2, 1], sent=[1, 2], group=group)
        return 2 * arrived_RD

A driver may cut autograd's graph at an exchange and differentiate the pieces one after the other. Hence the
rule for writing steps: after a `yield`, nothing that came before may be used in a differentiable way; what
the gradient must reach travels as one of the tensors. Integer tensors and Python numbers may be kept.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.groups import Group, Pending

T = TypeVar("T")


class Exchange(NamedTuple):
    """Rows (the first dimension) of several tensors to be sent, all with the same splits.

    tensors: in order of the process they go to. The gradients of those that require one travel back, which
    must be the same ones on all processes; integers ride along.
    received, sent: rows that come from and go to each process of `group`, in rank order.
    """

    tensors: tuple[Tensor, ...]
    received: list[int]
    sent: list[int]
    group: Group

    def start(self) -> list[Pending]:
        """Start sending every tensor; results in the order of `tensors`. Autograd does not see it."""
        return [self.group.start_all_to_all(x, self.received, self.sent) for x in self.tensors]

    def returning(self, tensors: Sequence[Tensor]) -> "Exchange":
        """Return the exchange that brings rows like those that arrived back to where they came from."""
        return Exchange(tuple(tensors), received=self.sent, sent=self.received, group=self.group)


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
    arrived: Any = _Exchange.apply(exchange.returning(()), *exchange.tensors)
    return arrived


class _Exchange(torch.autograd.Function):
    """Takes the way back, without tensors: a context that held what was sent would keep it in memory."""

    @staticmethod
    def forward(ctx: Any, back: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        arrived = _wait(back.returning(tensors))
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(x for x, want in zip(arrived, wanted, strict=True) if not want))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        back = ctx.back._replace(tensors=tuple(g for g, want in zip(grads, wanted, strict=True) if want))
        arrived = iter(_wait(back))
        return None, *(next(arrived) if want else None for want in wanted)


def _wait(exchange: Exchange) -> tuple[Tensor, ...]:
    return tuple(pending.wait() for pending in exchange.start())
