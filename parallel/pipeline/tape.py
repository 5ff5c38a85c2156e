"""A forward pass recorded in pieces, so that its backward pass can run piece by piece.

Autograd runs a graph backwards in one go. A pass that stops at exchanges, or that begins and ends at the
border of a pipeline stage, is cut instead: a `Tape` notes, for each cut, where the graph before it ends
(edges) and collects the gradients that the graph after it gives (slots). Going back over the cuts, last one
first, each piece is differentiated when all gradients of its results are there:

    cut        the collected gradients are those of the results
    exchange   the collected gradients travel back first, and the pass gives up its turn meanwhile
    replay     the piece after the cut was run without a graph; it is run again, and then backwards

Cut whatever is used in a differentiable way on both sides of an exchange. Gradients come out as from
one graph: the same operations, added up in the same order. A tape holds nodes of the graph, and tensors only
where a replay needs its input, so cutting costs no memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from model.block import BlockOutput
from parallel.exchange import Exchange
from parallel.pipeline.turns import Turns

T = TypeVar("T")

BlockTurns = Callable[["Tape", Tensor], Turns[BlockOutput]]
"""A block in turns, from the tape that its cuts go to and its input."""


class _Slot:
    """The gradient of one tensor behind a cut, as it comes in from the operations that used it."""

    def __init__(self, x: Tensor) -> None:
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add what one use of the tensor contributes."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def gradient_or_zeros(self) -> Tensor:
        """Return the sum; zeros where the tensor was used nowhere."""
        if self.gradient is None:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return self.gradient


class _Inlet(torch.autograd.Function):
    """Where a piece of the graph begins. A leaf would do the same, but would keep its values alive."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.slot.add(grads[0])
        return None, None, None


class _Cut(Protocol):
    """One entry of a tape."""

    edges: list[GradientEdge]
    """Where the graph before the cut ends."""

    def gradients(self) -> Turns[Sequence[Tensor | None]]:
        """Return the gradients of the edges, once everything behind the cut was differentiated."""
        ...


class _PlainCut:
    def __init__(self, edges: list[GradientEdge], slots: list[_Slot]) -> None:
        self.edges, self._slots = edges, slots

    def gradients(self) -> Turns[Sequence[Tensor | None]]:
        yield from ()
        return [slot.gradient for slot in self._slots]


class _ExchangeCut:
    def __init__(self, edges: list[GradientEdge], slots: list[_Slot], back: Exchange) -> None:
        self.edges, self._slots, self._back = edges, slots, back

    def gradients(self) -> Turns[Sequence[Tensor | None]]:
        # also where nothing arrived here: the other processes wait for this one
        gradients = tuple(slot.gradient_or_zeros() for slot in self._slots)
        self._slots = []
        pending = self._back._replace(tensors=gradients).start()
        yield
        return [one.wait() for one in pending]


class _ReplayCut:
    def __init__(self, edges: list[GradientEdge], slot: _Slot, x_BSD: Tensor, piece: BlockTurns) -> None:
        self.edges, self._slot, self._x_BSD, self._piece = edges, slot, x_BSD, piece

    def gradients(self) -> Turns[Sequence[Tensor | None]]:
        tape = Tape()
        output = yield from self._piece(tape, tape.enter(self._x_BSD))
        tape.close(output.x_BSD)
        del output
        return [(yield from tape.backward(self._slot.gradient_or_zeros()))]


class Tape:
    """The cuts of one pass of one microbatch: `enter`, forward, `close`, then once `backward`."""

    def __init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)
        self._cuts: list[_Cut] = []
        self._input: _Slot | None = None
        self._output: _Slot | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Return x as the input of the pass, whose gradient `backward` returns."""
        self._input = _Slot(x)
        return self._inlet(x, self._input)

    def cut(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors for use behind a cut; those without gradient as they are."""
        if not torch.is_grad_enabled():
            return tensors
        slots = {i: _Slot(x) for i, x in enumerate(tensors) if x.requires_grad}
        self._cuts.append(_PlainCut([get_gradient_edge(tensors[i]) for i in slots], list(slots.values())))
        return tuple(self._inlet(x, slots[i]) if i in slots else x for i, x in enumerate(tensors))

    def exchange(self, exchange: Exchange) -> Turns[tuple[Tensor, ...]]:
        """Return the rows that arrive, and give up the turn while they are under way."""
        tensors, grad = exchange.tensors, torch.is_grad_enabled()
        edges = {i: get_gradient_edge(x) for i, x in enumerate(tensors) if grad and x.requires_grad}
        back = exchange.gradients()
        pending = exchange._replace(tensors=tuple(x.detach() for x in tensors)).start()
        del exchange, tensors
        yield
        arrived = [one.wait().detach() for one in pending]
        slots = {i: _Slot(arrived[i]) for i in edges}
        if edges:
            self._cuts.append(_ExchangeCut(list(edges.values()), list(slots.values()), back))
        return tuple(self._inlet(x, slots[i]) if i in slots else x for i, x in enumerate(arrived))

    def replay(self, piece: BlockTurns, x_BSD: Tensor) -> Turns[BlockOutput]:
        """Return what a block computes, keeping its input only: the backward pass runs the block again."""
        output = yield from _without_graph(piece(self, x_BSD))
        slot = _Slot(output.x_BSD)
        self._cuts.append(_ReplayCut([get_gradient_edge(x_BSD)], slot, x_BSD.detach(), piece))
        return output._replace(x_BSD=self._inlet(output.x_BSD, slot))

    def close(self, output: Tensor) -> None:
        """Note the result of the pass, whose gradient `backward` is given."""
        self._output = _Slot(output)
        self._cuts.append(_PlainCut([get_gradient_edge(output)], [self._output]))

    def backward(self, gradient: Tensor) -> Turns[Tensor | None]:
        """Differentiate the pass, last piece first; return the gradient of what `enter` was given."""
        if self._output is None:
            raise RuntimeError("backward of a pass that was not closed, or that has run backwards already")
        self._output.add(gradient)
        del gradient
        self._output = None
        while self._cuts:
            cut = self._cuts.pop()
            gradients = yield from cut.gradients()
            used = [(e, g) for e, g in zip(cut.edges, gradients, strict=True) if g is not None]
            if used:
                torch.autograd.backward([edge for edge, _ in used], [grad for _, grad in used])
        return None if self._input is None else self._input.gradient

    def _inlet(self, x: Tensor, slot: _Slot) -> Tensor:
        inlet: Any = _Inlet.apply(self._anchor, x.detach(), slot)
        return inlet


def _without_graph(turns: Turns[T]) -> Turns[T]:
    """Run each turn without autograd, which stays on for whoever has the turn in between."""
    while True:
        with torch.no_grad():
            try:
                next(turns)
            except StopIteration as end:
                return end.value
        yield
