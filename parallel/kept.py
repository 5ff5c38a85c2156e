"""Activations that a rank holds for its backward passes, in closed form. Imports no torch.

What a microbatch leaves in a stage is in model/activations.py; here is how a layout spreads the work on its
tokens, and how many microbatches a rank holds at once, which follows from the schedule's table
(parallel/pipeline/in_flight.py). While a block is differentiated, what its recomputation brings back is in
memory as well; that is counted once, for the largest block.
"""

from dataclasses import dataclass, replace
from itertools import product

from model.activations import Spread, microbatch_saved_bytes, saved_bytes_per_token
from model.config import Recompute
from parallel.config import Context, Dispatcher, ParallelConfig, Schedule
from parallel.pipeline.in_flight import held_at_once, peak_bytes
from parallel.pipeline.rules import INTERLEAVED
from parallel.placement import count_stages
from parallel.stage_costs import Stages
from parallel.travel import blocks_reached
from parallel.work import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes that one microbatch leaves behind: of a layer of each kind, and of a stage without its layers."""

    dense: float
    moe: float
    edges: dict[tuple[bool, bool], int]
    """By whether the stage is the first, and whether it is the last."""
    recomputed_dense: float
    """What recomputing such a layer brings back for the time of its backward pass."""
    recomputed_moe: float

    @classmethod
    def of(cls, setting: Setting) -> "Kept":
        """Return what a setting keeps; the same for all layouts that differ in the pipeline only."""
        mode, spread = setting.parallel.recompute, spread_of(setting)
        precision = {"compute": setting.precision.compute, "gemm": setting.precision.gemm, "spread": spread}

        def layer(kind: int, recompute: Recompute) -> float:
            of_token = saved_bytes_per_token(setting.model, layer=kind, recompute=recompute, **precision)
            return setting.shared_tokens * of_token

        dense, moe = 0 if setting.model.num_dense_layers else None, setting.model.num_dense_layers
        edges = {
            (first, last): microbatch_saved_bytes(
                setting.model,
                layers=(),
                first=first,
                last=last,
                tokens=round(setting.shared_tokens),
                recompute=mode,
                **precision,
            )
            for first, last in product((False, True), repeat=2)
        }
        kept_dense = 0.0 if dense is None else layer(dense, mode)
        return cls(
            dense=kept_dense,
            moe=layer(moe, mode),
            edges=edges,
            recomputed_dense=0.0 if dense is None else layer(dense, Recompute.none) - kept_dense,
            recomputed_moe=layer(moe, Recompute.none) - layer(moe, mode),
        )

    def stage(self, *, dense: int, moe: int, first: bool, last: bool) -> float:
        """Return what one microbatch leaves in a stage of so many layers."""
        return dense * self.dense + moe * self.moe + self.edges[first, last]

    def recomputed(self, *, dense: int, moe: int) -> float:
        """Return what the largest of so many layers brings back."""
        return max(self.recomputed_dense if dense else 0.0, self.recomputed_moe if moe else 0.0)


def rank_activations(stages: Stages, kept: Kept, *, num_microbatches: int) -> list[float]:
    """Return the most bytes of activations that each pipeline rank keeps."""
    p, last = stages.setting.parallel, len(stages.layers) - 1
    per_stage = []
    for stage in range(len(stages.layers)):
        dense, moe = stages.layer_counts(stage)
        per_stage.append(kept.stage(dense=dense, moe=moe, first=stage == 0, last=stage == last))
    if p.pp == 1:
        return per_stage
    held = held_at_once(p.schedule, pp=p.pp, chunks=p.chunks, num_microbatches=_enough(p, num_microbatches))
    return [
        peak_bytes(held[rank], [per_stage[stage] for stage in stages.on_rank(rank)]) for rank in range(p.pp)
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
