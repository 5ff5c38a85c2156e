"""What FP8 loses in a step, over all processes: from their watches (model/fp8_watch.py) to a record.

Counts are summed and magnitudes maximised over the world. A weight that several processes hold is counted by
the first of them (parallel/sharding.py says who holds what), so pp, dp and ep give the counts of one process.

What that does not cover. Activations and gradients that several tp ranks hold, and keys and values that cp
ranks gather, are counted by each: tp and cp shift the mixture of tensors in a class. Transformer Engine
quantises out of sight, and nothing is counted.
"""

import torch
from torch.distributed import ReduceOp

from model.fp8_watch import Fp8Watch, TensorClass
from model.moe import MoE
from parallel.expert import AllToAllDispatcher
from parallel.groups import Group
from parallel.model import ParallelModel
from parallel.two_hop import TwoHopDispatcher
from parallel.wire import Fp8Wire

Fp8Numerics = dict[str, dict[str, float]]
"""By class of tensor (weights, activations, expert_rows, gradients): underflow, saturated, amax."""


def watch_of(model: ParallelModel) -> Fp8Watch:
    """Return a watch for this process's parts of a model; it counts what travels as FP8 codes, too."""
    reductions = {name: model.sharding.reduction(name) for name in model.named_parameters()}
    elsewhere = [
        parameter
        for name, parameter in model.named_parameters().items()
        if reductions[name].shard.rank or reductions[name].replicate.rank
    ]
    wires = [
        module.dispatcher.wire
        for part in model.parts.values()
        for module in part.modules()
        if isinstance(module, MoE) and isinstance(module.dispatcher, AllToAllDispatcher | TwoHopDispatcher)
    ]
    coded = [wire for wire in wires if isinstance(wire, Fp8Wire)]
    watch = Fp8Watch(elsewhere, arrives_coded=bool(coded))
    for wire in coded:
        wire.watch = watch
    return watch


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
