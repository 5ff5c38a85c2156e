"""What to change where a step does not fit: the three legal changes that cost the least time.

Each candidate changes one key of the layout or the precision, or recomputation and one more. Running each of
them dry would take minutes, so memory and time are estimated in closed form, as `python -m launch plan` does
(parallel/planner.py). What the closed form leaves out of the layout that did run, mostly temporaries, is
taken from the dry run and added to the memory of every candidate. Run a change dry to be sure of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.dryrun.job import RankReport, Request
from model.config import Compute, Gemm, PrecisionConfig, Recompute
from parallel.checks import layout_problems
from parallel.config import ParallelConfig, Schedule
from parallel.pipeline.rules import INTERLEAVED
from parallel.placement import count_stages
from parallel.planner import Plan, Task
from parallel.rates import missing
from train.config import Moments

SHOWN = 3
MOMENT_BYTES = {Moments.bf16: 2, Moments.fp32: 4}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change that would make the step fit.

    overrides: what to add to the command; num_bytes: of the fullest rank; slowdown: step time over that now.
    """

    overrides: tuple[str, ...]
    num_bytes: float
    slowdown: float


@dataclass(frozen=True)
class _Change:
    """Keys of the layout, by name, and whether blocks multiply in FP8."""

    keys: dict[str, Any]
    fp8: bool = False

    def parallel(self, present: ParallelConfig) -> ParallelConfig:
        changed = replace(present, **self.keys)
        alike = count_stages(changed) == count_stages(present)
        return changed if alike else replace(changed, layers_per_stage=[])

    def precision(self, present: PrecisionConfig) -> PrecisionConfig:
        return replace(present, gemm=Gemm.fp8_reference) if self.fp8 else present

    def overrides(self, stage: str, present: ParallelConfig) -> tuple[str, ...]:
        where = f"stages.{stage}.parallel"
        named = [f"{where}.{name}={value}" for name, value in self.keys.items()]
        if self.parallel(present).layers_per_stage != present.layers_per_stage:
            named.append(f"{where}.layers_per_stage=[]")
        return (*named, *["precision=fp8_reference"] * self.fp8)


def advise(request: Request, reports: Sequence[RankReport]) -> list[Advice]:
    """Return the cheapest changes that fit, the cheapest first; none where nothing is known of the device."""
    if missing(request.config.cluster, request.config.precision):
        return []
    present = Plan(_task(request, request.config.precision), request.parallel)
    left_out = max(each.peak.total - present.memory[each.pp_rank].total for each in reports)
    found = []
    for change in _changes(request):
        precision, parallel = change.precision(request.config.precision), change.parallel(request.parallel)
        if missing(request.config.cluster, precision) or not _legal(request, parallel):
            continue
        plan = Plan(_task(request, precision), parallel)
        num_bytes = plan.peak_memory + left_out
        if num_bytes <= plan.task.memory_limit:
            found.append(
                Advice(
                    overrides=change.overrides(request.stage, request.parallel),
                    num_bytes=num_bytes,
                    slowdown=plan.full_step.seconds / present.full_step.seconds,
                )
            )
    return sorted(found, key=lambda advice: advice.slowdown)[:SHOWN]


def _changes(request: Request) -> Iterator[_Change]:
    present, precision = request.parallel, request.config.precision
    can_fp8 = precision.gemm is Gemm.compute and precision.compute is Compute.bf16
    modes = list(Recompute)
    deeper = [_Change({"recompute": mode}) for mode in modes[modes.index(present.recompute) + 1 :]]
    others = [*_degrees(present), *_schedules(present)]
    if can_fp8:
        yield _Change({}, fp8=True)
    yield from deeper
    yield from others
    for recompute in deeper:
        yield from (_Change(recompute.keys | other.keys) for other in others)
        if can_fp8:
            yield _Change(recompute.keys, fp8=True)


def _degrees(present: ParallelConfig) -> Iterator[_Change]:
    """Yield doubled degrees and a halved microbatch; what does not fit is found out by the rules."""
    for name in ("pp", "ep", "tp", "cp"):
        yield _Change({name: 2 * getattr(present, name)})
    if present.microbatch_size > 1:
        yield _Change({"microbatch_size": present.microbatch_size // 2})


def _schedules(present: ParallelConfig) -> Iterator[_Change]:
    if present.pp > 1:
        for schedule in Schedule:
            if schedule is not present.schedule and schedule not in (Schedule.gpipe, *INTERLEAVED):
                yield _Change({"schedule": schedule})


def _legal(request: Request, parallel: ParallelConfig) -> bool:
    stage = request.stage_config
    return not layout_problems(
        parallel,
        model=request.config.model,
        world_size=request.world_size,
        batch_sizes={stage.batch.start, stage.batch.end},
        seq_len=stage.seq_len,
        path="parallel",
    )


def _task(request: Request, precision: PrecisionConfig) -> Task:
    config, stage = request.config, request.stage_config
    return Task(
        model=config.model,
        precision=precision,
        cluster=config.cluster,
        world_size=request.world_size,
        seq_len=stage.seq_len,
        batch_sizes=(stage.batch.end,),
        moment_bytes=MOMENT_BYTES[config.optimizer.moments],
        imbalance=request.imbalance,
    )
