"""A run's metrics beside what a plan of its own configuration predicts: speed and memory of every stage."""

from dataclasses import dataclass
from math import lcm
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from launch.plan.question import Question, questions
from launch.tables import new_table
from parallel.planner import Plan
from parallel.rates import GIGA
from train.config import RunConfig
from train.errors import RunError
from train.reporting.run_data import RunData, read_run

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One stage; None where the run has no figure. Memory is of one process, in bytes.

    tokens_per_second: of the whole job, the median over the steps of the largest batch.
    """

    stage: str
    tokens_per_second: float | None
    memory: float | None
    plan: Plan

    @property
    def predicted_tokens_per_second(self) -> float:
        """Return the prediction for the whole job."""
        return self.plan.tokens_per_second * self.plan.task.world_size


def read_measured(run_dir: Path, *, world_size: int | None) -> list[Measured]:
    """Return every stage that the run has records of. RunError where it has none, or no plan.

    world_size: processes of the run; None for the cluster's devices, or the fewest that the layout needs.
    """
    if not run_dir.is_dir():
        what = "is a file" if run_dir.is_file() else "does not exist"
        raise RunError(f"--metrics={run_dir} {what}; give the folder of a run that has started: runs/smoke")
    run = read_run(run_dir)
    if not run.records:
        raise RunError(f"{run_dir}/metrics.jsonl has no step yet; nothing to compare a plan with")
    devices = world_size or run.config.cluster.num_devices or fewest_processes(run.config)
    asked = questions(run.config, overrides=(), world_size=devices)
    found = [_stage(run, question) for question in asked]
    return [each for each in found if each is not None]


def fewest_processes(config: RunConfig) -> int:
    """Return the fewest processes that the layouts of all stages can run on."""
    layouts = [stage.parallel or config.parallel for stage in config.stages.values()]
    return lcm(*(p.pp * lcm(p.cp * p.tp * (p.dp or 1), p.ep) for p in layouts))


def _stage(run: RunData, question: Question) -> Measured | None:
    records = run.of_stage(question.name)
    if not records:
        return None
    if question.problems:
        lines = "\n".join(f"  {line}" for line in question.problems)
        raise RunError(f"the run's layout does not fit {question.task.world_size} processes:\n{lines}")
    largest = max(record["batch_size"] for record in records)
    timings = [record["timing"] for record in records if record["batch_size"] == largest]
    return Measured(
        stage=question.name,
        tokens_per_second=_middle(timings, "tokens_per_second"),
        memory=_scaled(max((t["memory_gib"] for t in timings if t.get("memory_gib")), default=None)),
        plan=Plan(question.task.with_batches(largest), question.own),
    )


def _middle(timings: list[dict[str, Any]], name: str) -> float | None:
    values = [timing[name] for timing in timings if timing.get(name) is not None]
    return median(values) if values else None


def _scaled(gib: float | None) -> float | None:
    return None if gib is None else gib * GIB


def measured_table(found: list[Measured]) -> Table:
    """Return a row for each stage."""
    table = new_table(
        "predicted and measured",
        left=("stage",),
        right=("tok/s predicted", "measured", "ratio", "GB predicted", "measured"),
    )
    for each in found:
        predicted, speed = each.predicted_tokens_per_second, each.tokens_per_second
        table.add_row(
            each.stage,
            f"{predicted:,.0f}",
            "-" if speed is None else f"{speed:,.0f}",
            "-" if speed is None else f"{speed / predicted:.2f}",
            f"{each.plan.peak_memory / GIGA:.2f}",
            "-" if each.memory is None else f"{each.memory / GIGA:.2f}",
        )
    return table


def measured_json(found: list[Measured]) -> list[dict[str, Any]]:
    """Return the same for programs; memory in bytes."""
    return [
        {
            "stage": each.stage,
            "tokens_per_second": {
                "predicted": each.predicted_tokens_per_second,
                "measured": each.tokens_per_second,
            },
            "memory_bytes": {"predicted": each.plan.peak_memory, "measured": each.memory},
        }
        for each in found
    ]
