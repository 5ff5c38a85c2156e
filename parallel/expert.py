"""Expert parallelism: every process holds a block of experts, and tokens travel to them (arXiv 2006.16668).

With N processes and E experts, process r of the group holds experts [r * E / N, (r + 1) * E / N). One
all-to-all takes each chosen (token, expert) pair to its expert, one brings the weighted output back:

    sort        the tokens' rows by expert, hence by process
    counts      rows for every expert of every process: the only thing the host must wait for
    exchange    rows in the compute type, their routing weights in FP32
    reorder     what arrived lies by (source, expert); experts want (expert, source)
    experts     as on one device
    and back    reorder, exchange, then the sum of each token's rows in FP32, rounded once

No token is dropped, and no step adds rows in an order that depends on timing.

Legend: T own tokens, D hidden, A experts per token, E experts, L = E / N local experts, N processes of the
group, R = T * A rows sent, Q rows received.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import Recompute
from model.dispatch import Dispatched, host_counts
from model.kernels.permute import RowOrder, combine, permute, sort_by_expert
from model.recompute import region
from model.router import Routing
from parallel.exchange import Exchange, Steps, run
from parallel.groups import Group


@dataclass(frozen=True)
class _State:
    """What `combine` needs: integers only.

    order: of the rows sent. sent_N, received_N: rows to and from each process. arrival_Q [Q]: the place among
    the arrived rows of each row handed to the experts; sorted_Q [Q] its inverse.
    """

    order: RowOrder
    sent_N: list[int]
    received_N: list[int]
    arrival_Q: Tensor
    sorted_Q: Tensor


class AllToAllDispatcher:
    """A `TokenDispatcher` that sends one row for each choice of each token.

    Args:
        ep: the processes that together hold all experts, in order of their blocks.
        num_experts: E, of the layer.
        recompute: where the copies of rows made by sorting are recomputed rather than kept. The exchange
            itself is never repeated for them, so rows are kept once, as they arrived.

    Raises:
        ValueError: if the experts cannot be divided evenly among the processes.
    """

    def __init__(self, ep: Group, num_experts: int, recompute: Recompute = Recompute.none) -> None:
        self.ep, self.recompute = ep, recompute
        self.local_experts = experts_per_process(num_experts, ep.size)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Return the rows, of all processes' tokens, that are routed to the experts held here."""
        return run(self.dispatch_steps(x_TD, routing))

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sum of the A rows of each own token, added up in FP32; [T, D]."""
        return run(self.combine_steps(rows_RD, dispatched))

    def dispatch_steps(self, x_TD: Tensor, routing: Routing) -> Steps[Dispatched]:
        """`dispatch`, with one exchange: rows and routing weights."""
        to_NL = routing.load_E.view(self.ep.size, self.local_experts)
        counts_under_way = self.ep.start_all_to_all(to_NL)
        order = sort_by_expert(routing.indices_TA)
        from_NL = counts_under_way.wait()
        sent_N, received_N, counts_L = read_counts(to_NL.sum(1), from_NL.sum(1), from_NL.sum(0))
        arrived_QD, arrived_weights_Q = yield Exchange(
            (
                region(self.recompute, partial(permute, order=order), x_TD),
                routing.weights_TA.flatten().gather(0, order.choice_R),
            ),
            received=received_N,
            sent=sent_N,
            group=self.ep,
        )
        arrival_Q, sorted_Q = _by_expert(from_NL, sum(received_N))
        reorder = partial(_reorder, index_Q=arrival_Q, inverse_Q=sorted_Q)
        state = _State(order, sent_N, received_N, arrival_Q, sorted_Q)
        return Dispatched(
            region(self.recompute, reorder, arrived_QD), reorder(arrived_weights_Q), counts_L, state
        )

    def combine_steps(self, rows_RD: Tensor, dispatched: Dispatched) -> Steps[Tensor]:
        """`combine`, with one exchange: the experts' output in the compute type."""
        state: _State = dispatched.state
        back_QD = _reorder(rows_RD, state.sorted_Q, state.arrival_Q)
        (own_RD,) = yield Exchange((back_QD,), received=state.sent_N, sent=state.received_N, group=self.ep)
        return combine(own_RD, state.order)


def experts_per_process(num_experts: int, num_processes: int) -> int:
    """Return how many experts each process holds; ValueError if that is not a whole number."""
    if num_experts % num_processes:
        raise ValueError(f"{num_experts} experts cannot be divided evenly among {num_processes} processes")
    return num_experts // num_processes


def read_counts(*counts: Tensor) -> list[list[int]]:
    """Return integer vectors as Python integers, all with one wait of the host."""
    numbers = iter(host_counts(torch.cat(counts)))
    return [[next(numbers) for _ in range(len(vector))] for vector in counts]


def _by_expert(from_NL: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the order from (source, expert) to (expert, source) and its inverse, int64 [Q] each."""
    expert_NL = torch.arange(from_NL.shape[1], device=from_NL.device).expand_as(from_NL)
    # the size is known to the host; without it the device would have to be asked
    expert_Q = expert_NL.flatten().repeat_interleave(from_NL.flatten(), output_size=num_rows)
    order = sort_by_expert(expert_Q[:, None])
    return order.choice_R, order.row_TA.flatten()


class _Reorder(torch.autograd.Function):
    """Row index[r] of x as row r. The gradient is a gather as well, by the inverse: nothing is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_Q: Tensor, inverse_Q: Tensor) -> Tensor:
        ctx.inverse_Q = inverse_Q
        return x.index_select(0, index_Q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse_Q), None, None


def _reorder(x: Tensor, index_Q: Tensor, inverse_Q: Tensor) -> Tensor:
    """Return x with its rows in another order, of which `inverse` is the inverse."""
    reordered: Any = _Reorder.apply(x, index_Q, inverse_Q)
    return reordered
