"""The answer as tables, at most 120 columns wide."""

from collections.abc import Iterable

from rich.table import Table

from launch.plan.answer import StageAnswer
from launch.plan.published import REPORT, STAGE_COSTS, Comparison
from launch.plan.sensitivity import STEP, Effect
from launch.tables import new_table
from parallel.config import Context, ParallelConfig
from parallel.pipeline.rules import INTERLEAVED
from parallel.planner import Plan
from parallel.rates import GIGA

HOURS_OF_A_DAY = 24
CUT = "cut: layers on stages by hand, layers_per_stage"
"""What a mark on a layout means."""


def ranking(answer: StageAnswer) -> Table:
    """Return a row for each layout of a stage; times and traffic are those of a step of the largest batch."""
    task = answer.question.task
    table = new_table(
        f"{answer.question.name}: {max(task.batch_sizes):,} sequences of {task.seq_len:,} tokens a step, "
        f"{task.world_size:,} × {task.cluster.name}",
        left=("layout", "schedule", "experts", "recompute"),
        right=("GB", "out", "in", "bubble", "step s", "tok/s", "MFU", "h/T"),
    )
    for plan in answer.plans:
        step, own = plan.full_step, answer.is_own(plan)
        style = ("red" if answer.own_problems else "cyan") if own else None
        table.add_row(
            ("* " if own else "  ") + degrees(plan.parallel, plan.layout.dp),
            schedule_name(plan.parallel),
            str(plan.parallel.dispatcher) if plan.parallel.ep > 1 else "local",
            str(plan.parallel.recompute),
            f"{plan.peak_memory / GIGA:.1f}",
            f"{step.traffic.inter / GIGA:.0f}",
            f"{step.traffic.intra / GIGA:.0f}",
            f"{step.bubble:.1%}",
            f"{step.seconds:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            "-" if plan.mfu is None else f"{plan.mfu:.1%}",
            f"{plan.gpu_hours_per_trillion_tokens:,.0f}",
            style=style,
        )
    return table


def memory(plan: Plan, title: str) -> Table:
    """Return a row for each pipeline rank: 10^9 bytes of one of its devices, and its layers."""
    table = new_table(
        f"memory of a device, GB: {title}",
        left=("pipeline rank", "layers"),
        right=("weights", "codes", "gradients", "optimizer", "activations", "recomputed", "total"),
    )
    for rank, use in enumerate(plan.memory):
        state = use.state
        figures = (state.parameters, state.codes, state.gradients, state.optimizer + state.buffers)
        table.add_row(
            str(rank),
            _spans(plan.stages.layers_of(rank)),
            *(f"{figure / GIGA:.2f}" for figure in (*figures, use.activations, use.recomputed, use.total)),
        )
    return table


def costs(answers: Iterable[StageAnswer]) -> Table:
    """Return a row for each stage of the run, its ramp included, and their sum beside what was published."""
    table = new_table(
        "the run",
        left=("stage", "layout"),
        right=("tokens", "steps", "GPU hours", "days", "dollars"),
    )
    for answer in answers:
        plan, question = answer.chosen, answer.question
        table.add_row(
            question.name,
            "as configured" if answer.is_own(plan) else f"best: {_brief(plan)}",
            f"{question.num_tokens / GIGA:,.3f} G",
            f"{sum(question.steps.values()):,}",
            *_cost(answer.gpu_hours(plan), plan),
        )
    return table


def published_costs(answers: Iterable[StageAnswer]) -> Table:
    """Return a row for each published cost of a stage, or of several, beside the prediction."""
    table = new_table(
        f"published ({REPORT}; 2,048 devices, FP8) and predicted",
        left=("stages",),
        right=("GPU hours", "dollars", "predicted hours", "dollars", "difference"),
    )
    by_name = {answer.question.name: answer for answer in answers}
    for stages, cost in STAGE_COSTS.items():
        if not by_name.keys() >= set(stages):
            continue
        mine = [by_name[stage] for stage in stages]
        hours = sum(answer.gpu_hours(answer.chosen) for answer in mine)
        rent = mine[0].question.task.cluster.dollars_per_hour
        table.add_row(
            " + ".join(stages),
            f"{cost.gpu_hours:,.0f}",
            f"{cost.dollars:,.0f}",
            f"{hours:,.0f}",
            "-" if rent is None else f"{hours * rent:,.0f}",
            f"{hours / cost.gpu_hours - 1:+.1%}",
        )
    return table


def effects(found: Iterable[Effect]) -> Table:
    """Return a row for each assumption: device hours per trillion tokens with it a fifth lower and higher."""
    table = new_table(
        f"what the answer hangs on: GPU hours per trillion tokens with one assumption moved by {STEP:.0%}",
        left=("assumption",),
        right=("value", "lower", "higher"),
    )
    for each in found:
        table.add_row(each.name, f"{each.value:.3g}", f"{each.lower:,.0f}", f"{each.higher:,.0f}")
    return table


def comparisons(found: Iterable[Comparison]) -> Table:
    """Return a row for each published speed."""
    table = new_table(
        "published and predicted: tokens per second and device, DeepSeek-V3 at 4096 tokens, nothing fitted",
        left=("run", "layout"),
        right=("published", "predicted", "error"),
    )
    for each in found:
        plan = each.plan
        table.add_row(
            each.point.name,
            f"{degrees(plan.parallel, plan.layout.dp)} {schedule_name(plan.parallel)}",
            f"{each.point.tokens_per_second:,.0f}",
            f"{each.predicted:,.0f}",
            f"{each.error:+.1%}",
        )
    return table


def is_published(answer: StageAnswer) -> bool:
    """Return whether a stage is one of the published run, on as many of the same devices."""
    task = answer.question.task
    return task.cluster.name == "h800" and task.model.num_layers == 61 and task.model.hidden_size == 7168


def degrees(p: ParallelConfig, dp: int) -> str:
    """Return the degrees that are not 1 (cpu: cp with context=ulysses), and the rest of a row's name."""
    cp = f"cp{'u' if p.context is Context.ulysses else ''}"
    named = {"pp": p.pp, "ep": p.ep, "tp": p.tp, cp: p.cp, "dp": dp}
    shown = [f"{name}{degree}" for name, degree in named.items() if degree > 1]
    return " ".join([*shown, f"mb{p.microbatch_size}", *["cut"] * bool(p.layers_per_stage)])


def schedule_name(p: ParallelConfig) -> str:
    """Return the schedule, with its stages per rank where they can be chosen."""
    if p.pp == 1:
        return "-"
    return f"{p.schedule} ×{p.chunks}" if p.schedule in INTERLEAVED else str(p.schedule)


def _brief(plan: Plan) -> str:
    return f"{degrees(plan.parallel, plan.layout.dp)} {schedule_name(plan.parallel)}"


def _cost(gpu_hours: float, plan: Plan) -> tuple[str, str, str]:
    rent = plan.task.cluster.dollars_per_hour
    days = gpu_hours / plan.task.world_size / HOURS_OF_A_DAY
    return f"{gpu_hours:,.0f}", f"{days:,.3g}", "-" if rent is None else f"{gpu_hours * rent:,.0f}"


def _spans(layers: list[int]) -> str:
    """Return layer numbers with those that follow each other as spans, such as 0-1, 60."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1][1:] = [layer]
        else:
            spans.append([layer])
    return ", ".join("-".join(map(str, span)) for span in spans)
