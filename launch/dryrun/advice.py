"""What to change where a step does not fit: the three legal changes that cost the least time.

Each candidate changes one key of the layout or the precision, or recomputation and one more. There are
dozens, so memory and time are first estimated in closed form, as `python -m launch plan` does
(parallel/planner.py). Those that should fit are then run dry, the fastest first, each on the rank that is
likely to be fullest, until three are found that do fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from launch.dryrun.job import RankReport, Request
from launch.dryrun.rank import run_rank
from launch.dryrun.shortened import enough_microbatches
from launch.plan.question import task_of
from model.config import Compute, Gemm, PrecisionConfig, Recompute
from parallel.checks import layout_problems
from parallel.config import ParallelConfig, Schedule
from parallel.layout import rank_at
from parallel.pipeline.rules import INTERLEAVED
from parallel.placement import count_stages
from parallel.planner import Plan, Task
from parallel.rates import missing
from train.config import StageParallelConfig

SHOWN, TRIED = 3, 6


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change that would make the step fit.

    overrides: what to add to the command; num_bytes: of the fullest rank, run dry; slowdown: step time over
    that now, in closed form.
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
        return replace(present, gemm=Gemm.fp8_triton) if self.fp8 else present

    def overrides(self, stage: str, present: ParallelConfig) -> tuple[str, ...]:
        where = f"stages.{stage}.parallel"
        named = [f"{where}.{name}={value}" for name, value in self.keys.items()]
        if self.parallel(present).layers_per_stage != present.layers_per_stage:
            named.append(f"{where}.layers_per_stage=[]")
        return (*named, *["precision=fp8_triton"] * self.fp8)


def advise(request: Request, reports: Sequence[RankReport]) -> list[Advice]:
    """Return the cheapest changes that fit, the cheapest first; none where nothing is known of the device."""
    if missing(request.config.cluster, request.config.precision):
        return []
    present = Plan(_task(request, request.config.precision), request.parallel)
    fullest = max(reports, key=lambda report: report.peak.total)
    likely: list[tuple[Plan, _Change]] = []
    for change in _changes(request):
        precision, parallel = change.precision(request.config.precision), change.parallel(request.parallel)
        if missing(request.config.cluster, precision) or not _legal(request, parallel):
            continue
        plan = Plan(_task(request, precision), parallel)
        if plan.fits:
            likely.append((plan, change))
    found = []
    for plan, change in sorted(likely, key=lambda pair: pair[0].full_step.seconds)[:TRIED]:
        changed = _changed(request, plan)
        report = run_rank(changed, _fullest_rank(changed, plan, fullest, request))
        if report.peak.total <= plan.task.memory_limit:
            slowdown = plan.full_step.seconds / present.full_step.seconds
            overrides = change.overrides(request.stage, request.parallel)
            found.append(Advice(overrides=overrides, num_bytes=report.peak.total, slowdown=slowdown))
        if len(found) == SHOWN:
            break
    return found


def _changed(request: Request, plan: Plan) -> Request:
    """Return the request with the layout and the precision of a plan."""
    config = replace(request.config, precision=plan.task.precision)
    stage = replace(request.stage_config, parallel=StageParallelConfig(**_keys(plan.parallel)))
    in_step = plan.num_microbatches(stage.batch.end)
    return replace(
        request,
        config=replace(config, stages=config.stages | {request.stage: stage}),
        num_microbatches=enough_microbatches(plan.parallel, in_step),
        microbatches_of_step=in_step,
    )


def _keys(parallel: ParallelConfig) -> dict[str, Any]:
    return {each.name: getattr(parallel, each.name) for each in fields(parallel)}


def _fullest_rank(changed: Request, plan: Plan, fullest: RankReport, request: Request) -> int:
    """Return the rank to try: where the pipeline stays as it is, the one that is fullest now."""
    pipeline = ("pp", "schedule", "chunks")
    alike = all(getattr(changed.parallel, key) == getattr(request.parallel, key) for key in pipeline)
    totals = [memory.total for memory in plan.memory]
    pp_rank = fullest.pp_rank if alike else totals.index(max(totals))
    axes = changed.layout.dense_axes
    return rank_at(axes, dict.fromkeys(axes, 0) | {"pp": pp_rank})


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
    stage = request.stage_config
    return task_of(
        replace(request.config, precision=precision),
        stage,
        world_size=request.world_size,
        batch_sizes=[stage.batch.end],
        imbalance=request.imbalance,
    )
