"""Which decoder layers each pipeline stage holds, and which stages each pipeline rank. Imports no torch.

A pipeline is as fast as its slowest stage, so layers are cut where the largest cost of a stage is least. Cost
is training FLOPs per token (model/cost.py). Looking up embeddings costs nothing; the last stage also has the
output head, once for the main model and once for each MTP depth, and the MTP modules themselves: as much as
four layers of DeepSeek-V3, so that its last stage holds few layers or none.

Stages are numbered along the forward pass; parallel/pipeline/rules.py lays them on ranks. Without pipeline
parallelism (pp = 1) the model is one stage, whatever the schedule.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf

from model.config import ModelConfig
from model.cost import head_flops_per_token, layer_flops_per_token, mtp_flops_per_token
from parallel.config import ParallelConfig, Schedule
from parallel.pipeline.rules import num_stages, stage_to_rank


def count_stages(config: ParallelConfig) -> int:
    """Return the stages of the pipeline; one, whatever the schedule, without pipeline parallelism."""
    return num_stages(config.schedule, pp=config.pp, chunks=config.chunks) if config.pp > 1 else 1


def assign_layers(
    config: ModelConfig, seq_len: int, num_stages: int, *, layers_per_stage: Sequence[int] = ()
) -> list[range]:
    """Return the layers of every stage: contiguous, in order, together all of them.

    No other cut has a smaller largest stage. Among the cuts that share this optimum the one with the least
    sum of squares is taken, which evens out the other stages, and among these the one with fewer layers in
    earlier stages. So only the first and the last stage may be without layers: two layers of one stage would
    cost less on two, the stages between moved along by one.

    Args:
        config: the model.
        seq_len: tokens of a sequence; attention costs more in longer ones.
        num_stages: stages of the whole pipeline.
        layers_per_stage: the number of layers of every stage, where it is chosen by hand.

    Raises:
        ValueError: if `layers_per_stage` does not fit, or there are too few layers for the stages between the
            first and the last one. `parallel.checks` says so in words before.
    """
    if layers_per_stage:
        if not is_legal(layers_per_stage, num_layers=config.num_layers, num_stages=num_stages):
            raise ValueError(
                f"layers_per_stage={list(layers_per_stage)} does not cut {config.num_layers} layers "
                f"into {num_stages} stages"
            )
        return _ranges([0, *accumulate(layers_per_stage)])
    if config.num_layers < num_stages - 2:
        raise ValueError(f"{config.num_layers} layers are too few for {num_stages} stages")
    costs = [layer_flops_per_token(config, layer, seq_len) for layer in range(config.num_layers)]
    return _ranges(_cuts(costs, num_stages, tail=tail_flops_per_token(config, seq_len)))


def is_legal(layers_per_stage: Sequence[int], *, num_layers: int, num_stages: int) -> bool:
    """Return whether these numbers of layers cover the model, with a layer in every stage but the ends."""
    return (
        len(layers_per_stage) == num_stages
        and sum(layers_per_stage) == num_layers
        and all(count > 0 for count in layers_per_stage[1:-1])
        and all(count >= 0 for count in layers_per_stage)
    )


def tail_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the training FLOPs per token of the last stage beside its layers: the heads and MTP modules."""
    return head_flops_per_token(config) + mtp_flops_per_token(config, seq_len)


def stages_on_rank(schedule: Schedule, pp: int, chunks: int, rank: int) -> list[int]:
    """Return the stages of a pipeline rank, in the order of the forward pass."""
    if pp == 1:
        return [0]
    return [stage for stage, r in enumerate(stage_to_rank(schedule, pp=pp, chunks=chunks)) if r == rank]


def rank_of_stage(schedule: Schedule, pp: int, chunks: int, stage: int) -> int:
    """Return the pipeline rank that holds a stage; the inverse of `stages_on_rank`."""
    return 0 if pp == 1 else stage_to_rank(schedule, pp=pp, chunks=chunks)[stage]


def _ranges(cuts: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _cuts(costs: Sequence[int], num_stages: int, *, tail: int) -> list[int]:
    """Return the num_stages + 1 cuts between layers that `assign_layers` describes."""
    largest, _ = _best_cuts(costs, num_stages, tail=tail, join=max)

    def add_square(cost: int, rest: float) -> float:
        return rest + cost**2 if cost <= largest else inf

    return _best_cuts(costs, num_stages, tail=tail, join=add_square)[1]


def _best_cuts(
    costs: Sequence[int], num_stages: int, *, tail: int, join: Callable[[int, float], float]
) -> tuple[float, list[int]]:
    """Return the least value of all ways to cut, and the cuts; by dynamic programming from the last stage on.

    The value of stages s, s + 1, … is join(cost of stage s, value of stages s + 1, …), integers all along.
    """
    num_layers = len(costs)
    before = [0, *accumulate(costs)]
    # of the stages from one on, by the layer they begin with: their least value, and where the first one ends
    value: list[float] = [join(before[-1] - before[start] + tail, 0) for start in range(num_layers + 1)]
    ends: list[list[int]] = []
    for _ in range(num_stages - 1):
        best: list[tuple[float, int]] = []
        for start in range(num_layers + 1):
            stops = range(start, num_layers + 1)
            options = ((join(before[stop] - before[start], value[stop]), stop) for stop in stops)
            best.append(min(options))  # of equal values the smaller stage
        value = [least for least, _ in best]
        ends.insert(0, [stop for _, stop in best])
    cuts = [0]
    for stage_ends in ends:
        cuts.append(stage_ends[cuts[-1]])
    return value[0], [*cuts, num_layers]
