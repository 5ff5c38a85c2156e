"""What FP8 loses in a step, over all processes: from their watches (model/fp8_watch.py) to a record.

Counts are summed and magnitudes maximised over the world. A weight that several processes hold is counted by
the first of them (parallel/sharding.py says who holds what), so pp, dp and ep give the counts of one process.

What that does not cover. Activations and gradients that several tp ranks hold, and keys and values that cp
ranks gather, are counted by each: tp and cp shift the mixture of tensors in a class. Where tokens travel to
experts of other processes as FP8 codes, rows and the gradients of the experts' output are left out: they were
quantised before anything here sees them. Transformer Engine quantises out of sight, and nothing is counted.
"""

import torch
from torch.distributed import ReduceOp

from model.config import PrecisionConfig
from model.fp8_watch import Fp8Watch, TensorClass
from parallel.groups import Group
from parallel.model import ParallelModel

Fp8Numerics = dict[str, dict[str, float]]
"""By class of tensor (weights, activations, expert_rows, gradients): underflow, saturated, amax."""


def watch_of(model: ParallelModel, precision: PrecisionConfig) -> Fp8Watch:
    """Return a watch for this process's parts of a model."""
    reductions = {name: model.sharding.reduction(name) for name in model.named_parameters()}
    elsewhere = [
        parameter
        for name, parameter in model.named_parameters().items()
        if reductions[name].shard.rank or reductions[name].replicate.rank
    ]
    return Fp8Watch(elsewhere, arrives_coded=precision.exchanges_codes and model.mesh.ep.size > 1)


def measured(watch: Fp8Watch, world: Group, device: torch.device) -> Fp8Numerics | None:
    """Return shares and magnitudes of a step; None where the watch was not active.

    All processes call this together. Classes in which nothing but zeros was counted are left out.
    """
    if not watch.active:
        return None
    totals = watch.totals(device)
    counts = world.all_reduce(totals.counts).tolist()
    amax = world.all_reduce(totals.amax, op=ReduceOp.MAX).tolist()
    return {
        kind.value: {"underflow": underflow / present, "saturated": saturated / present, "amax": largest}
        for kind, (present, underflow, saturated), largest in zip(TensorClass, counts, amax, strict=True)
        if present
    }
