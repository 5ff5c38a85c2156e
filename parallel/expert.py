"""Expert parallelism: every process holds a block of experts, and tokens travel to them (arXiv 2006.16668).

With N processes and E experts, process r of the group holds experts [r * E / N, (r + 1) * E / N). One
all-to-all takes each chosen (token, expert) pair to its expert, one brings the weighted output back:

    sort        the tokens' rows by expert, hence by process
    counts      rows for every expert of every process: the only thing the host must wait for
    exchange    rows in the compute type or as FP8 codes (parallel/wire.py), their routing weights in FP32
    reorder     what arrived lies by (source, expert); experts want (expert, source)
    experts     as on one device
    and back    reorder, exchange, then the sum of each token's rows in FP32, rounded once

No token is dropped, and no step adds rows in an order that depends on timing.

Legend: T own tokens, D hidden, A experts per token, E experts, L = E / N local experts, N processes of the
group, R = T * A rows sent, Q rows received.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.config import Recompute
from model.dispatch import Dispatched, host_counts
from model.kernels.permute import RowOrder, combine, sort_by_expert
from model.router import Routing
from parallel.exchange import Exchange, Steps, run
from parallel.groups import Group
from parallel.wire import Gather, gather, wire


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
        fp8: rows, and the gradients of the experts' output, travel as FP8 codes.

    Raises:
        ValueError: if the experts cannot be divided evenly among the processes.
    """

    def __init__(
        self, ep: Group, num_experts: int, recompute: Recompute = Recompute.none, *, fp8: bool = False
    ) -> None:
        self.ep, self.wire = ep, wire(recompute, fp8=fp8)
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
        payload = self.wire.pack(x_TD, top_k=routing.weights_TA.shape[1])
        *arrived, arrived_weights_Q = yield Exchange(
            (
                *self.wire.gather(payload, Gather(order.token_R, partial(combine, order=order))),
                routing.weights_TA.flatten().gather(0, order.choice_R),
            ),
            received=received_N,
            sent=sent_N,
            group=self.ep,
            trips=self.wire.dispatched,
        )
        arrival_Q, sorted_Q = _by_expert(from_NL, sum(received_N))
        reorder = _reorder(arrival_Q, sorted_Q)
        rows_QD = self.wire.unpack(tuple(arrived), reorder)
        state = _State(order, sent_N, received_N, arrival_Q, sorted_Q)
        return Dispatched(rows_QD, gather(arrived_weights_Q, reorder), counts_L, state)

    def combine_steps(self, rows_RD: Tensor, dispatched: Dispatched) -> Steps[Tensor]:
        """`combine`, with one exchange: the experts' output in the compute type."""
        state: _State = dispatched.state
        (own_RD,) = yield Exchange(
            (gather(rows_RD, _reorder(state.sorted_Q, state.arrival_Q)),),
            received=state.sent_N,
            sent=state.received_N,
            group=self.ep,
            trips=self.wire.combined,
        )
        return self.wire.finish(combine(own_RD, state.order), top_k=state.order.row_TA.shape[1])


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


def _reorder(index_Q: Tensor, inverse_Q: Tensor) -> Gather:
    """Return how to change the order of rows. The gradient is a gather as well: nothing is scattered."""
    return Gather(index_Q, lambda grad: grad.index_select(0, inverse_Q))
