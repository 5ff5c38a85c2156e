"""Activations that a rank holds for its backward passes, in closed form. Imports no torch.

What a microbatch leaves in a stage is in model/activations.py, and what of it waits for weight gradients
that are put off is in model/put_off.py. Here is how a layout spreads the work on its tokens, and how many
microbatches a rank holds at once in either way, which follows from the schedule's table
(parallel/pipeline/in_flight.py). While a block is differentiated, what its recomputation brings back is in
memory as well; that is counted once, for the largest block.

Not counted: temporary tensors, such as gate and up beside their gradients, and hidden states and gradients
that wait to be sent or used, a few of them at each border of a stage.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from model.activations import Spread, microbatch_saved_bytes
from model.config import Recompute
from model.put_off import microbatch_put_off_bytes
from parallel.config import Context, Dispatcher, ParallelConfig, Schedule
from parallel.pipeline.in_flight import held_at_once, peak_bytes
from parallel.pipeline.rules import INTERLEAVED
from parallel.placement import count_stages
from parallel.stage_costs import Stages
from parallel.travel import blocks_reached
from parallel.work import Setting

PartBytes = Callable[[tuple[int, ...], bool, bool], int]
"""Bytes of a microbatch in some layers, in the first stage or not, in the last stage or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBytes:
    """Bytes of one microbatch: in a layer of each kind, and in a stage beside its layers."""

    dense: float
    moe: float
    edges: dict[tuple[bool, bool], int]
    """By whether the stage is the first, and whether it is the last."""

    @classmethod
    def of(cls, of_part: PartBytes, num_dense_layers: int) -> "StageBytes":
        """Return the bytes of what the function counts for the layers and the ends of a part of the model."""
        ends = tuple(product((False, True), repeat=2))
        edges = {(first, last): of_part((), first, last) for first, last in ends}

        def layer(kind: int) -> float:
            return of_part((kind,), False, False) - edges[False, False]

        return cls(
            dense=layer(0) if num_dense_layers else 0.0,
            moe=layer(num_dense_layers),
            edges=edges,
        )

    def stage(self, *, dense: int, moe: int, first: bool, last: bool) -> float:
        """Return the bytes in a stage of so many layers."""
        return dense * self.dense + moe * self.moe + self.edges[first, last]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What a microbatch holds in memory; the same for all layouts that differ in the pipeline only."""

    whole: StageBytes
    """From its forward pass to its backward pass."""
    put_off: StageBytes
    """From there to its weight gradients, where they are put off."""
    unsaved: StageBytes
    """What a forward pass would leave if nothing were recomputed."""

    @classmethod
    def of(cls, setting: Setting) -> "Kept":
        """Return what a setting keeps."""
        model, tokens, mode = setting.model, round(setting.shared_tokens), setting.parallel.recompute
        how = {
            "compute": setting.precision.compute,
            "gemm": setting.precision.gemm,
            "spread": spread_of(setting),
        }

        def saved(recompute: Recompute) -> PartBytes:
            return lambda layers, first, last: microbatch_saved_bytes(
                model, layers=layers, first=first, last=last, tokens=tokens, recompute=recompute, **how
            )

        def put_off(layers: tuple[int, ...], first: bool, last: bool) -> int:
            return microbatch_put_off_bytes(model, layers=layers, last=last, tokens=tokens, **how)

        return cls(
            whole=StageBytes.of(saved(mode), model.num_dense_layers),
            put_off=StageBytes.of(put_off, model.num_dense_layers),
            unsaved=StageBytes.of(saved(Recompute.none), model.num_dense_layers),
        )

    def recomputed(self, *, dense: int, moe: int) -> float:
        """Return what recomputing the largest of so many layers brings back while it is differentiated."""
        return max(
            self.unsaved.dense - self.whole.dense if dense else 0.0,
            self.unsaved.moe - self.whole.moe if moe else 0.0,
        )


def rank_activations(stages: Stages, kept: Kept, *, num_microbatches: int) -> list[float]:
    """Return the most bytes of activations that each pipeline rank keeps."""
    p, last = stages.setting.parallel, len(stages.layers) - 1
    whole: list[float] = []
    put_off: list[float] = []
    for stage in range(len(stages.layers)):
        dense, moe = stages.layer_counts(stage)
        for sizes, of_parts in ((whole, kept.whole), (put_off, kept.put_off)):
            sizes.append(of_parts.stage(dense=dense, moe=moe, first=stage == 0, last=stage == last))
    if p.pp == 1:
        return whole
    held = held_at_once(p.schedule, pp=p.pp, chunks=p.chunks, num_microbatches=_enough(p, num_microbatches))
    places = [stages.on_rank(rank) for rank in range(p.pp)]
    return [
        peak_bytes(held[rank], [whole[i] for i in places[rank]], [put_off[i] for i in places[rank]])
        for rank in range(p.pp)
    ]


def rank_recomputed(stages: Stages, kept: Kept) -> list[float]:
    """Return what the largest layer of each pipeline rank brings back while it is differentiated."""
    result = []
    for pp_rank in range(stages.setting.parallel.pp):
        counts = [stages.layer_counts(stage) for stage in stages.on_rank(pp_rank)]
        dense, moe = (sum(each) for each in zip(*counts, strict=True))
        result.append(kept.recomputed(dense=dense, moe=moe))
    return result


def spread_of(setting: Setting) -> Spread:
    """Return how the layout spreads the work on a token; routing is balanced, but for `setting.imbalance`."""
    p, moe = setting.parallel, setting.model.moe
    rows = moe.top_k / p.tp * setting.imbalance
    spread = Spread(
        sequence_shares=p.tp,
        memory_tokens=float(p.cp) if p.context is Context.gather else 1.0,
        routed_rows=rows,
        experts=moe.num_experts // p.ep,
        coded_rows=setting.precision.exchanges_codes,
    )
    if p.ep == 1:
        return spread
    two_hop = p.dispatcher is Dispatcher.two_hop and p.ep > p.node_size
    arrived = blocks_reached(moe, p.ep) / p.tp * setting.imbalance if two_hop else rows
    return replace(spread, arrived_rows=arrived)


def _enough(p: ParallelConfig, num_microbatches: int) -> int:
    """Return a number of microbatches of which no fewer are held at once than of `num_microbatches`."""
    even = num_microbatches % p.pp == 0 or p.schedule not in INTERLEAVED
    all_at_once = p.schedule == Schedule.gpipe
    return num_microbatches if all_at_once or not even else min(num_microbatches, 4 * count_stages(p))
