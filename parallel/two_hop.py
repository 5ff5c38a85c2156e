"""Expert parallelism in two hops: between nodes a token travels once, inside a node it spreads.

Links between nodes are several times slower than links inside one. DeepSeek-V3 (arXiv 2412.19437, section
3.2.2) therefore sends a token over them at most once for each node that holds any of its experts, to the
process with the same place in that node, which passes it on inside the node:

    hop 1   over `inter`, the processes with the same place in every node
    hop 2   over `intra`, the processes of one node
    locally a row for each (token, expert) pair, sorted by expert

Both hops are one rule, applied twice: a token goes once to each member that holds any of its experts, and
takes along which experts are meant there and with which weights. As FP8 codes (parallel/wire.py) it is
quantised before the first hop and decoded behind the second. The outputs return the same way: at each
of the three stages a token's rows are summed in FP32, and the sum is rounded to the compute type to travel.

Traffic: over `inter` a token causes one row for each distinct node of its experts, there and back, its own
node being a copy in memory. Where nodes coincide with the router's groups of experts, these are at most
top_k_groups rows (4 in V3) instead of top_k (8). Over `intra` it is one row for each distinct process.

All row counts of both hops are known before the first row leaves: they travel ahead, the same two hops, and
the host waits for them once.

Legend: T tokens, D hidden, A experts per token, R rows, M members of a hop, C copies a token may have,
N nodes, P processes per node, L local experts per process.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import Recompute
from model.dispatch import Dispatched
from model.kernels.blocks import wide_type
from model.router import Routing
from parallel.exchange import Exchange, Steps, run
from parallel.expert import experts_per_process, read_counts
from parallel.groups import Group
from parallel.wire import Gather, Payload, gather, through, wire


@dataclass(frozen=True)
class _Copies:
    """Rows that are copies of tokens, at least one of each, sorted by destination and then by token.

    place_R [R]: t * C + c, the place in the [T, C] table of destinations that row r fills; token_R [R]: t.
    row_CT [C, T]: the row of copy c of token t, or -1 where there is none (the inverse of place_R).
    """

    place_R: Tensor
    token_R: Tensor
    row_CT: Tensor


class _Tokens(NamedTuple):
    """Tokens on their way. payload: as the wire holds them; weights_TA FP32; experts_TA int32: numbered from
    the first expert of those who see the token here, -1 for a choice that lives elsewhere."""

    payload: Payload
    weights_TA: Tensor
    experts_TA: Tensor


class _Splits(NamedTuple):
    """Rows that one hop sends to and receives from each of its members."""

    sent_M: list[int]
    received_M: list[int]


class _Stage(NamedTuple):
    """What the way back through a hop needs: integers only."""

    copies: _Copies
    splits: _Splits


@dataclass(frozen=True)
class _State:
    """The three stages of the way there: between nodes, inside the node, at the experts; top_k: A."""

    inter: _Stage
    intra: _Stage
    local: _Copies
    top_k: int


class TwoHopDispatcher:
    """A `TokenDispatcher` for nodes with fast links inside and slow links in between.

    Experts lie in blocks as in `AllToAllDispatcher`, by ep rank = node * P + place in the node.

    Args:
        inter: the processes with this one's place in every node, in order of nodes.
        intra: the processes of this node, in order of places.
        num_experts: E, of the layer.
        recompute: where the copies of rows are recomputed rather than kept: a token is then kept once on
            each process that it reached, however many experts it has there.
        fp8: tokens, and the gradients of the experts' output, travel as FP8 codes.

    Raises:
        ValueError: if the experts cannot be divided evenly among the processes.
    """

    def __init__(
        self,
        inter: Group,
        intra: Group,
        num_experts: int,
        recompute: Recompute = Recompute.none,
        *,
        fp8: bool = False,
    ) -> None:
        self.inter, self.intra, self.wire = inter, intra, wire(recompute, fp8=fp8)
        self.local_experts = experts_per_process(num_experts, inter.size * intra.size)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Return the rows, of all processes' tokens, that are routed to the experts held here."""
        return run(self.dispatch_steps(x_TD, routing))

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sum of the expert outputs of each own token; [T, D]."""
        return run(self.combine_steps(rows_RD, dispatched))

    def dispatch_steps(self, x_TD: Tensor, routing: Routing) -> Steps[Dispatched]:
        """`dispatch`, with one exchange over `inter` and one over `intra`."""
        inter, intra, counts_L = self._count(routing)
        top_k = routing.weights_TA.shape[1]
        payload = self.wire.pack(x_TD, top_k=top_k)
        tokens = _Tokens(payload, routing.weights_TA, routing.indices_TA.int())
        per_node = self.intra.size * self.local_experts
        tokens, inter_copies = yield from self._hop(tokens, self.inter, inter, per_member=per_node)
        tokens, intra_copies = yield from self._hop(tokens, self.intra, intra, per_member=self.local_experts)
        local = _copy_to(tokens.experts_TA, sum(counts_L))
        state = _State(_Stage(inter_copies, inter), _Stage(intra_copies, intra), local, top_k)
        row_weights_R = tokens.weights_TA.flatten().gather(0, local.place_R)
        rows_RD = self.wire.unpack(tokens.payload, _spread(local))
        return Dispatched(rows_RD, row_weights_R, counts_L, state)

    def combine_steps(self, rows_RD: Tensor, dispatched: Dispatched) -> Steps[Tensor]:
        """`combine`, with one exchange over `intra` and one over `inter`."""
        state: _State = dispatched.state
        y_TD = _collect(rows_RD, state.local)
        for group, (copies, splits) in ((self.intra, state.intra), (self.inter, state.inter)):
            (rows_RD,) = yield Exchange(
                (y_TD,),
                received=splits.sent_M,
                sent=splits.received_M,
                group=group,
                trips=self.wire.combined,
            )
            y_TD = _collect(rows_RD, copies)
        return self.wire.finish(y_TD, top_k=state.top_k)

    def _count(self, routing: Routing) -> tuple[_Splits, _Splits, list[int]]:
        """Return the splits of both hops and the rows of each local expert, after two small exchanges.

        Each process tells every node how many of its tokens come there, how many of them go on to each
        process, and how many rows each expert gets. Inside the node the sums of these are passed on.
        """
        num_nodes, node_size, local = self.inter.size, self.intra.size, self.local_experts
        to_node_N = _reach(routing.indices_TA // (node_size * local), num_nodes).sum(0)
        to_process = _reach(routing.indices_TA // local, num_nodes * node_size).sum(0)
        from_node_NX = self.inter.all_to_all(
            torch.cat(
                [to_node_N[:, None], to_process.view(num_nodes, -1), routing.load_E.view(num_nodes, -1)], 1
            )
        )
        onward_P, load_X = from_node_NX[:, 1:].sum(0).split([node_size, node_size * local])
        from_place_PX = self.intra.all_to_all(torch.cat([onward_P[:, None], load_X.view(node_size, -1)], 1))
        sent_N, received_N, sent_P, received_P, counts_L = read_counts(
            to_node_N, from_node_NX[:, 0], onward_P, from_place_PX[:, 0], from_place_PX[:, 1:].sum(0)
        )
        return _Splits(sent_N, received_N), _Splits(sent_P, received_P), counts_L

    def _hop(
        self, tokens: _Tokens, group: Group, splits: _Splits, *, per_member: int
    ) -> Steps[tuple[_Tokens, _Copies]]:
        """Send each token once to each member of the group that holds, or leads to, any of its experts.

        per_member: experts behind each member. Returns the tokens that arrived and the copies sent.
        """
        reach_TM = _reach(tokens.experts_TA // per_member, group.size)
        members_M = torch.arange(group.size, device=reach_TM.device)
        copies = _copy_to(torch.where(reach_TM, members_M, -1), sum(splits.sent_M))
        first_R = copies.place_R % group.size * per_member
        experts_RA = tokens.experts_TA[copies.token_R] - first_R[:, None].int()
        elsewhere_RA = (experts_RA < 0) | (experts_RA >= per_member)
        spread = _spread(copies)
        *payload, weights_TA, experts_TA = yield Exchange(
            (
                *self.wire.gather(tokens.payload, spread),
                gather(tokens.weights_TA, spread),
                experts_RA.masked_fill(elsewhere_RA, -1),
            ),
            received=splits.received_M,
            sent=splits.sent_M,
            group=group,
            trips=self.wire.dispatched,
        )
        return _Tokens(tuple(payload), weights_TA, experts_TA), copies


def _reach(member_TA: Tensor, num_members: int) -> Tensor:
    """Return whether any choice of a token lies at a member, bool [T, M]; choices at -1 are nowhere."""
    reach_TX = torch.zeros(member_TA.shape[0], 1 + num_members, dtype=torch.bool, device=member_TA.device)
    return reach_TX.scatter_(1, member_TA.long() + 1, True)[:, 1:]


def _copy_to(destination_TC: Tensor, num_rows: int) -> _Copies:
    """Return the copies that a table of destinations asks for: `num_rows`, one for each entry but -1."""
    key = destination_TC.flatten()
    last = torch.iinfo(key.dtype).max
    place_R = key.masked_fill(key < 0, last).argsort(stable=True)[:num_rows]
    row = place_R.new_full(key.shape, -1)
    row[place_R] = torch.arange(num_rows, device=key.device)
    return _Copies(place_R, place_R // destination_TC.shape[1], row.view(destination_TC.shape).T.contiguous())


def _spread(copies: _Copies) -> Gather:
    """Return how rows are copied: row token_R[r] as row r; the gradient is the sum of a row's copies."""
    return Gather(copies.token_R, partial(_sum_copies, row_CT=copies.row_CT))


def _collect(rows_RD: Tensor, copies: _Copies) -> Tensor:
    """Return for each token the sum of its copies, summed in FP32, [T, D]; the gradient is copied to them."""
    sum_copies = partial(_sum_copies, row_CT=copies.row_CT)
    return through(rows_RD, sum_copies, lambda grad_TD: grad_TD.index_select(0, copies.token_R))


def _sum_copies(rows_RD: Tensor, row_CT: Tensor) -> Tensor:
    """Return out[t] = the sum over c of rows[row_CT[c, t]] where there is one, [T, D], type of rows.

    Copy after copy in FP32: always in one order, with no two writes to one place.
    """
    total_TD = rows_RD.new_zeros(row_CT.shape[1], rows_RD.shape[1], dtype=wide_type(rows_RD))
    for row_T in row_CT:
        part_TD = rows_RD.index_select(0, row_T.clamp(min=0))
        total_TD += part_TD.masked_fill_((row_T < 0)[:, None], 0)
    return total_TD.to(rows_RD.dtype)
