"""Which collective a training step runs on which group of its layout, so that exactly these are tried.

| group | carries | operations |
| --- | --- | --- |
| world | losses, expert counts, the gradient norm | all_reduce |
| pp | hidden states of a microbatch, to the next stage and back | relay |
| dp | counts of valid tokens | all_reduce |
| cp | tokens against heads, with context=ulysses | all_to_all |
| tp | statistics of the loss | all_reduce |
| sequence | latents and hidden states, gathered and summed | all_gather, reduce_scatter |
| ep | rows for experts, in one exchange | all_to_all |
| ep_inter, ep_intra | the same in two hops, with dispatcher=two_hop | all_to_all |
| dp_cp, dp_cp_tp, edp, ends | gradients, then weights | reduce_scatter, all_gather |
| dp_replicate, edp_replicate | gradients of copies of the optimizer state | all_reduce |
"""

from collections.abc import Iterator

from parallel.config import Context, Dispatcher, ParallelConfig
from parallel.groups import Group
from parallel.mesh import Mesh

Use = tuple[str, Group | None]
"""An operation, and this process's group for it; None where it is in no such group."""


def uses(mesh: Mesh, config: ParallelConfig) -> Iterator[Use]:
    """Yield what a step does on every group, in one order on every process."""
    yield "all_reduce", mesh.world
    yield "relay", mesh.pp
    yield "all_reduce", mesh.dp
    if config.context is Context.ulysses:
        yield "all_to_all", mesh.cp
    yield "all_reduce", mesh.tp
    yield "all_gather", mesh.sequence
    yield "reduce_scatter", mesh.sequence
    two_hops = config.dispatcher is Dispatcher.two_hop and mesh.layout.ep_nodes > 1
    for group in (mesh.ep_inter, mesh.ep_intra) if two_hops else (mesh.ep,):
        yield "all_to_all", group
    yield from _gradients(mesh)


def world_uses(world: Group) -> Iterator[Use]:
    """Yield what is tried where no layout can be built: every collective over all processes."""
    for operation in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "relay"):
        yield operation, world


def _gradients(mesh: Mesh) -> Iterator[Use]:
    for reduction in (mesh.dense, mesh.replicated, mesh.expert):
        yield "reduce_scatter", reduction.shard
        yield "all_gather", reduction.shard
        yield "all_reduce", reduction.replicate
    ends = mesh.ends.shard if mesh.ends else None
    yield "reduce_scatter", ends
    yield "all_gather", ends
