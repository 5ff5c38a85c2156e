"""Activations that a rank holds for its backward passes, in closed form. Imports no torch.

What a microbatch leaves in a stage is in model/activations.py; here is how a layout spreads the work on its
tokens, and how many microbatches a rank holds at once, which follows from the schedule's table
(parallel/pipeline/in_flight.py). While a block is differentiated, what its recomputation brings back is in
memory as well; that is counted once, for the largest block.
"""

from collections.abc import Sequence
from dataclasses import replace

from model.activations import Spread, microbatch_saved_bytes, saved_bytes_per_token
from model.config import Recompute
from parallel.config import Context, Dispatcher, Schedule
from parallel.pipeline.in_flight import held_at_once, peak_bytes
from parallel.pipeline.rules import INTERLEAVED
from parallel.placement import count_stages, stages_on_rank
from parallel.travel import blocks_reached
from parallel.work import Setting


def rank_activations(setting: Setting, layers: Sequence[range], *, num_microbatches: int) -> list[float]:
    """Return the most bytes of activations that each pipeline rank keeps. layers: of every stage."""
    p = setting.parallel
    per_stage = _per_stage(setting, layers)
    if p.pp == 1:
        return [float(per_stage[0])]
    held = held_at_once(
        p.schedule, pp=p.pp, chunks=p.chunks, num_microbatches=_enough(setting, num_microbatches)
    )
    return [
        peak_bytes(
            held[rank], [per_stage[stage] for stage in stages_on_rank(p.schedule, p.pp, p.chunks, rank)]
        )
        for rank in range(p.pp)
    ]


def _per_stage(setting: Setting, layers: Sequence[range]) -> list[int]:
    """Return what one microbatch leaves in every stage; stages of as many layers of a kind are alike."""
    known: dict[tuple[int, int, bool, bool], int] = {}
    result = []
    for stage, mine in enumerate(layers):
        first, last = stage == 0, stage == len(layers) - 1
        dense = sum(layer < setting.model.num_dense_layers for layer in mine)
        kind = (dense, len(mine), first, last)
        if kind not in known:
            known[kind] = stage_bytes(setting, mine, first=first, last=last)
        result.append(known[kind])
    return result


def stage_bytes(setting: Setting, layers: range, *, first: bool, last: bool) -> int:
    """Return what one microbatch leaves in a stage, which may be the first or the last one."""
    return microbatch_saved_bytes(
        setting.model,
        layers=layers,
        first=first,
        last=last,
        tokens=round(setting.shared_tokens),
        recompute=setting.parallel.recompute,
        compute=setting.precision.compute,
        gemm=setting.precision.gemm,
        spread=spread_of(setting),
    )


def working_bytes(setting: Setting, layers: Sequence[int]) -> float:
    """Return what recomputing the largest of these blocks brings back for the time of its backward pass."""

    def of_layer(layer: int, recompute: Recompute) -> float:
        return setting.shared_tokens * saved_bytes_per_token(
            setting.model,
            layer=layer,
            recompute=recompute,
            compute=setting.precision.compute,
            gemm=setting.precision.gemm,
            spread=spread_of(setting),
        )

    mode = setting.parallel.recompute
    if mode is Recompute.none:
        return 0.0
    kinds = {layer < setting.model.num_dense_layers: layer for layer in layers}  # one layer of each kind
    return max(
        (of_layer(layer, Recompute.none) - of_layer(layer, mode) for layer in kinds.values()), default=0.0
    )


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


def _enough(setting: Setting, num_microbatches: int) -> int:
    """Return a number of microbatches of which no fewer are held at once than of `num_microbatches`."""
    p = setting.parallel
    even = num_microbatches % p.pp == 0 or p.schedule not in INTERLEAVED
    all_at_once = p.schedule == Schedule.gpipe
    return num_microbatches if all_at_once or not even else min(num_microbatches, 4 * count_stages(p))
