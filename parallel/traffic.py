"""Bytes that one microbatch hands to the exchanges of tokens with experts, in closed form. Imports no torch.

Counted as `parallel.groups.Trace` counts them: everything that a process puts into an all-to-all, the part
for itself included, with balanced routing. (parallel/links.py asks what crosses which link.) For each layer,
R rows a process, D hidden, A experts a token, E experts:

    counts              int64, before the rows leave
    forward, dispatch   R rows of a token, its weights in FP32, and in two hops the experts meant in INT32
    forward, combine    R rows of outputs
    backward            R rows of gradients for each of the two, and the gradients of the weights

`alltoall` sends a row, with one weight, for each of a token's A choices. `two_hop` sends a row, with all A
weights, for each distinct node and then for each distinct process that holds any of them; parallel/travel.py
says how many these are. Under FP8 dispatch the rows of dispatch, and the gradients of combine, are codes.
Where blocks are recomputed whole, dispatch is repeated in the backward pass. Combine is not, since all that
its gradient needs is known by then; but where DualPipeV replays a block phase by phase, it is as well.
"""

from dataclasses import dataclass

from model.config import Compute, ModelConfig, PrecisionConfig, Recompute
from model.cost import FP32_BYTES, element_bytes
from parallel.config import Dispatcher, ParallelConfig, Schedule
from parallel.travel import blocks_reached

INT32_BYTES, INT64_BYTES = 4, 8
FP8_TILE = 128
"""Elements of a coded row that share a scale of one byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBytes:
    """Bytes of a row of hidden width on its four trips."""

    dispatch: int
    combine: int
    dispatch_gradient: int
    combine_gradient: int


def row_bytes(hidden_size: int, *, compute: Compute, fp8: bool) -> RowBytes:
    """Return the bytes of a row. fp8: rows travel as codes where experts would quantise them anyway."""
    plain = hidden_size * element_bytes(compute)
    coded = hidden_size + -(-hidden_size // FP8_TILE) if fp8 else plain
    return RowBytes(dispatch=coded, combine=plain, dispatch_gradient=plain, combine_gradient=coded)


def row_bytes_of(model: ModelConfig, precision: PrecisionConfig) -> RowBytes:
    """Return the bytes of a row under a precision policy."""
    return row_bytes(model.hidden_size, compute=precision.compute, fp8=precision.exchanges_codes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One all-to-all of a dispatch.

    group: name of the process group; members: its processes; rows: sent by a process, on average; choices:
    routing weights, and where experts are named experts, that ride with a row.
    """

    group: str
    members: int
    rows: float
    choices: int


def hops(model: ModelConfig, parallel: ParallelConfig, *, tokens: int) -> list[Hop]:
    """Return the all-to-alls that bring a process's `tokens` to their experts; none where ep = 1."""
    moe, ep = model.moe, parallel.ep
    if ep == 1:
        return []
    nodes = num_nodes(parallel)
    if nodes == 1:
        return [Hop(group="ep", members=ep, rows=tokens * moe.top_k, choices=1)]
    return [
        Hop(
            group="ep_inter",
            members=nodes,
            rows=tokens * blocks_reached(moe, nodes),
            choices=moe.top_k,
        ),
        Hop(
            group="ep_intra",
            members=ep // nodes,
            rows=tokens * blocks_reached(moe, ep),
            choices=moe.top_k,
        ),
    ]


def num_nodes(parallel: ParallelConfig) -> int:
    """Return the nodes between which tokens hop; 1 where one all-to-all brings them to their experts."""
    two_hop = parallel.dispatcher is Dispatcher.two_hop and parallel.ep > parallel.node_size
    return parallel.ep // parallel.node_size if two_hop else 1


def exchanged_bytes(
    model: ModelConfig, parallel: ParallelConfig, *, tokens: int, row: RowBytes
) -> dict[str, float]:
    """Return the bytes that one microbatch of one layer puts into each group's all-to-alls, both passes.

    Args:
        model: the model.
        parallel: a layout without problems.
        tokens: of the microbatch, on one process.
        row: bytes of a row on its trips (`row_bytes`).
    """
    again = parallel.recompute is Recompute.full
    replayed = again and parallel.pp > 1 and parallel.schedule == Schedule.dualpipev
    found: dict[str, float] = {}
    for hop in hops(model, parallel, tokens=tokens):
        named = INT32_BYTES if num_nodes(parallel) > 1 else 0
        there = row.dispatch + hop.choices * (FP32_BYTES + named)
        back = row.dispatch_gradient + hop.choices * FP32_BYTES
        forward = (1 + again) * there + (1 + replayed) * row.combine
        counts = (1 + again) * _count_bytes(model, parallel, hop)
        found[hop.group] = hop.rows * (forward + back + row.combine_gradient) + counts
    return found


def _count_bytes(model: ModelConfig, parallel: ParallelConfig, hop: Hop) -> int:
    """Return the bytes of the counts that travel ahead: rows for every expert, process and node behind it."""
    experts, nodes = model.moe.num_experts, num_nodes(parallel)
    match hop.group:
        case "ep":
            counts = experts
        case "ep_inter":
            counts = nodes + parallel.ep + experts
        case _:
            counts = hop.members + experts // nodes
    return INT64_BYTES * counts
