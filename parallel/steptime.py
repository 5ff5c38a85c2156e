"""How long a step takes: the table on a clock, then gradients, optimizer, weights. Imports no torch.

    a pass            its computation, then the exchanges and collectives that nothing hides
    a joined pair     the longer of both passes' computation and both passes' exchange of tokens; computation
                      has 1 - cluster.communication_share of the device, since exchanges occupy the rest
    between stages    a transfer, which delays who waits for it and occupies nobody
    after the table   each rank reduces its gradients as soon as it is done; all wait for the norm, update
                      their shares of the weights at the speed of memory, and gather the weights

Only DualPipeV joins passes. Nothing else is hidden: not the reduction of gradients, not the gathering.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from model.cost import FP32_BYTES
from parallel.cost import RankMemory
from parallel.links import Bytes, ring
from parallel.pipeline.clock import Run, Slot, cached_program, run
from parallel.pipeline.rules import INTERLEAVED
from parallel.pipeline.table import ActionKind
from parallel.placement import rank_of_stage
from parallel.stage_costs import Stages
from parallel.work import PassTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, and what one device of the busiest pipeline rank sends in it."""

    pipeline: float
    """From the first pass to the end of the last."""
    reduce: float
    """From then until the last rank has reduced its gradients."""
    update: float
    gather: float
    bubble: float
    """Idle fraction of all ranks' time in the pipeline."""
    experts: Bytes
    collectives: Bytes
    pipeline_transfers: Bytes
    data_parallel: Bytes

    @property
    def seconds(self) -> float:
        """Return the time of the whole step."""
        return self.pipeline + self.reduce + self.update + self.gather

    @property
    def traffic(self) -> Bytes:
        """Return all that is sent."""
        return self.experts + self.collectives + self.pipeline_transfers + self.data_parallel


def step_time(
    stages: Stages,
    *,
    num_microbatches: int,
    memory: list[RankMemory],
    moment_bytes: int,
    rough: bool = False,
) -> StepTime:
    """Return the time of a step.

    Args:
        stages: what they cost for one microbatch.
        num_microbatches: of one data-parallel rank.
        memory: of every pipeline rank (`parallel.cost.rank_memory`).
        moment_bytes: bytes of an element of each of AdamW's two moments.
        rough: continue long tables in a straight line, for a search: within 2 % of the whole table.
    """
    passes_run = _pipeline(stages, num_microbatches, rough=rough)
    makespan, ends, bubble = passes_run.makespan, passes_run.ends, passes_run.bubble
    reduces, updates, gathers, sent = [], [], [], []
    for pp_rank, end in enumerate(ends):
        tail = _tail(stages, pp_rank, memory[pp_rank], moment_bytes=moment_bytes)
        reduces.append(end + tail.reduce)
        updates.append(tail.update)
        gathers.append(tail.gather)
        sent.append(tail.sent)
    busiest = max(range(len(ends)), key=stages.routed_blocks)
    p, passes = stages.setting.parallel, 2 * num_microbatches
    return StepTime(
        pipeline=makespan,
        reduce=max(0.0, max(reduces) - makespan),
        update=max(updates),
        gather=max(gathers),
        bubble=bubble,
        experts=stages.blocks.exchange * (passes * stages.routed_blocks(busiest)),
        collectives=stages.blocks.collectives * (passes * stages.num_blocks(busiest)),
        pipeline_transfers=stages.border * (passes * len(stages.on_rank(busiest)) if p.pp > 1 else 0),
        data_parallel=sent[busiest],
    )


def _pipeline(stages: Stages, num_microbatches: int, *, rough: bool) -> Run:
    p = stages.setting.parallel
    if p.pp == 1:
        one = stages.times[0]
        seconds = num_microbatches * (
            _seconds(one, "forward") + _seconds(one, "backward_input") + one.backward_weight
        )
        return Run(busy=(seconds,), ends=(seconds,))
    short = 4 * p.pp + num_microbatches % p.pp
    even = num_microbatches % p.pp == 0 or p.schedule not in INTERLEAVED
    if not rough or num_microbatches <= short + 2 * p.pp or not even:
        return _table_run(stages, num_microbatches)
    return _continued(
        _table_run(stages, short), _table_run(stages, short + p.pp), num_microbatches, short, p.pp
    )


def _continued(one: Run, two: Run, num_microbatches: int, short: int, more: int) -> Run:
    """Return the run that goes on as from `short` microbatches, `one`, to `short + more`, `two`."""
    times = (num_microbatches - short) / more

    def extend(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(x + times * (y - x) for x, y in zip(a, b, strict=True))

    return replace(one, busy=extend(one.busy, two.busy), ends=extend(one.ends, two.ends))


def _table_run(stages: Stages, num_microbatches: int) -> Run:
    p, times = stages.setting.parallel, stages.times
    program = cached_program(p.schedule, pp=p.pp, chunks=p.chunks, num_microbatches=num_microbatches)
    costs = {slot: _slot_seconds(slot, times, stages.cluster.communication_share) for slot in program.slots}
    border = stages.border.seconds(stages.setting.rates)
    ranks = [rank_of_stage(p.schedule, p.pp, p.chunks, stage) for stage in range(len(times))]
    transfers = [0.0 if a == b else border for a, b in pairwise(ranks)]
    return run(program, costs, transfers=transfers)


def _seconds(times: PassTimes, name: str) -> float:
    """Return a pass's time where nothing is hidden."""
    way = "forward" if name == "forward" else "backward"
    exchanged = getattr(times, f"exchange_{way}") + getattr(times, f"collective_{way}")
    return getattr(times, name) + exchanged


def _slot_seconds(slot: Slot, times: list[PassTimes], communication_share: float) -> float:
    kind, stage, other = slot
    one = times[stage]
    match kind:
        case ActionKind.FORWARD:
            return _seconds(one, "forward")
        case ActionKind.BACKWARD_INPUT:
            return _seconds(one, "backward_input")
        case ActionKind.BACKWARD_WEIGHT:
            return one.backward_weight
        case ActionKind.BACKWARD:
            return _seconds(one, "backward_input") + one.backward_weight
        case _:
            return _joined(one, times[other], communication_share)


def _joined(forward: PassTimes, backward: PassTimes, communication_share: float) -> float:
    """Return the time of a forward and a backward pass that hide each other's exchange."""
    exchanged = forward.exchange_forward + backward.exchange_backward
    computed = forward.forward + backward.backward_input + backward.backward_weight
    waited = forward.collective_forward + backward.collective_backward
    slowed = computed / (1 - communication_share) if exchanged else computed
    return max(slowed + waited, exchanged)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tail:
    reduce: float
    update: float
    gather: float
    sent: Bytes


def _tail(stages: Stages, pp_rank: int, memory: RankMemory, *, moment_bytes: int) -> _Tail:
    """Return what comes after the passes: gradients are FP32, weights of the compute type."""
    layout, cluster, setting = stages.layout, stages.cluster, stages.setting
    experts = stages.expert_elements(pp_rank)
    whole = setting.parallel.zero_stage == 1
    held = memory.gradients / FP32_BYTES if whole else memory.parameters / setting.width
    axes = layout.expert_axes
    groups = (
        (held - experts, layout.dp_shard * layout.cp, layout.tp),
        (experts, axes["edp_shard"], layout.ep),
    )
    reduced, gathered, owned = Bytes(), Bytes(), 0.0
    for elements, members, stride in groups:
        shard = elements / members
        owned += shard
        reduced += ring(FP32_BYTES * shard, members=members, stride=stride, cluster=cluster)
        gathered += ring(setting.width * shard, members=members, stride=stride, cluster=cluster)
    # of every own weight: gradient read for the norm and the update, master and moments read and written
    touched = owned * (4 * FP32_BYTES + 4 * moment_bytes + setting.width) + FP32_BYTES * held  # and zeros
    return _Tail(
        reduce=reduced.seconds(setting.rates),
        update=touched / setting.rates.memory,
        gather=gathered.seconds(setting.rates),
        sent=reduced + gathered,
    )
