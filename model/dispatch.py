"""Bringing tokens to their experts and back: the seam for experts that live elsewhere.

Legend: T tokens, D hidden, A experts per token, R = T * A routed rows, sorted by expert, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from model.config import Recompute
from model.kernels.permute import combine, permute, sort_by_expert
from model.recompute import region
from model.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert, ready for the experts held here.

    rows_RD in the compute type; row_weights_R FP32, the routing weight that travels with its row; counts:
    rows per expert, in order, summing to R; state: what the same dispatcher's `combine` needs.
    """

    rows_RD: Tensor
    row_weights_R: Tensor
    counts: list[int]
    state: Any


class TokenDispatcher(Protocol):
    """dispatch, then the experts, then combine; rows may cross devices in between."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Return the rows of all tokens routed to the experts held here."""
        ...

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sum of each token's expert outputs, [T, D]; the rows are weighted already."""
        ...


CountReader = Callable[[Tensor], list[int]]
"""Gives the integers in a vector of counts."""

_read_counts: ContextVar[CountReader] = ContextVar("read_counts", default=Tensor.tolist)


def host_counts(counts_E: Tensor) -> list[int]:
    """Return counts as Python integers: the one place where the host waits for a routing decision."""
    return _read_counts.get()(counts_E)


@contextmanager
def counts_from(reader: CountReader) -> Iterator[None]:
    """Let `reader` say what `host_counts` returns: in a dry run tensors have no values to be read."""
    before = _read_counts.set(reader)
    try:
        yield
    finally:
        _read_counts.reset(before)


class LocalDispatcher:
    """All experts on this device: a permutation there and back, no token dropped.

    The rows are copies of a norm's output, so where that is recomputed, so are they.
    """

    def __init__(self, recompute: Recompute = Recompute.none) -> None:
        self.recompute = recompute

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Return every choice of every token as a row, sorted by expert."""
        order = sort_by_expert(routing.indices_TA)
        row_weights_R = routing.weights_TA.flatten().gather(0, order.choice_R)
        rows_RD = region(self.recompute, partial(permute, order=order), x_TD)
        return Dispatched(rows_RD, row_weights_R, host_counts(routing.load_E), order)

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sum of the A rows of each token, added up in FP32; [T, D]."""
        return combine(rows_RD, dispatched.state)
