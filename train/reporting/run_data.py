"""A run directory read back: its configuration, the record of every step, and its evaluations.

The report, the closing table and the charts take their figures from here, so that a loss "beyond the
previous stage's length" means the same everywhere.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from train.config import RunConfig
from train.errors import RunError
from train.stored_config import read_config

TAIL_STEPS = 20
"""The final loss of a stage is the mean over this many of its last steps: one step's loss is noise."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything a report is made of; records are in the order of their steps."""

    run_dir: Path
    config: RunConfig
    records: list[dict[str, Any]]
    evaluations: dict[tuple[str, str], dict[str, Any]]  # by stage and "before", "after"

    @property
    def stages(self) -> list[str]:
        """The stages that have at least one step or evaluation, in run order."""
        seen = {record["stage"] for record in self.records} | {stage for stage, _ in self.evaluations}
        return [name for name in self.config.stages if name in seen]

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Return the records of one stage."""
        return [record for record in self.records if record["stage"] == stage]

    def last_evaluation(self) -> dict[str, Any] | None:
        """Return the evaluation that speaks for the run as it stands: the last one after a stage."""
        after = [self.evaluations.get((stage, "after")) for stage in self.stages]
        return next((result for result in reversed(after) if result is not None), None)


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """What one stage did. None where it was not measured."""

    name: str
    seq_len: int
    tokens: int
    steps: int
    skipped: int
    seconds: float
    final_loss: float | None  # training loss, mean of the last TAIL_STEPS steps
    previous_length: int | None  # longest length trained on before this stage
    before: "EvaluationSummary | None"
    after: "EvaluationSummary | None"


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """One evaluation in three numbers."""

    held_out: float | None  # nats per token
    beyond: float | None  # mean loss at positions past the previous stage's length
    needle: float | None  # share of keys retrieved, over the whole grid


def read_run(run_dir: Path) -> RunData:
    """Read a run directory. Raises RunError when it is not one, or when one of its files is damaged."""
    config = read_config(run_dir / "config.yaml")
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise RunError(
            f"{path} does not exist; name the directory of a run that has started, such as runs/smoke"
        )
    return RunData(
        run_dir=run_dir,
        config=config,
        records=_read_records(path),
        evaluations=_read_evaluations(run_dir / "evaluations"),
    )


def stage_summaries(run: RunData) -> list[StageSummary]:
    """Summarise every stage of the run that has begun."""
    summaries: list[StageSummary] = []
    previous: int | None = None
    for name in run.stages:
        records = run.of_stage(name)
        seq_len = run.config.stages[name].seq_len
        summaries.append(
            StageSummary(
                name=name,
                seq_len=seq_len,
                tokens=records[-1]["stage_tokens"] if records else 0,
                steps=len(records),
                skipped=sum(record["skipped"] for record in records),
                seconds=sum(record["timing"]["seconds"] for record in records),
                final_loss=_final_loss(records),
                previous_length=previous,
                before=_evaluation_summary(run.evaluations.get((name, "before")), previous),
                after=_evaluation_summary(run.evaluations.get((name, "after")), previous),
            )
        )
        previous = max(seq_len, previous or 0)
    return summaries


def loss_beyond(result: Mapping[str, Any], length: int) -> float | None:
    """Return the mean loss at positions from `length` on, or None when none was measured."""
    parts = [part for part in result.get("by_position") or [] if part["from"] >= length]
    measured = [part for part in parts if part["loss"] is not None]
    if not measured:
        return None
    # Bins differ in width, and a mean over positions is what is wanted.
    widths = [part["to"] - part["from"] for part in measured]
    return sum(part["loss"] * width for part, width in zip(measured, widths, strict=True)) / sum(widths)


def needle_score(result: Mapping[str, Any]) -> float | None:
    """Return the mean of the needle grid, or None when there is none."""
    scores = [score for row in (result.get("needle") or {}).get("grid", []) for score in row]
    return fmean(scores) if scores else None


def _final_loss(records: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [record["loss"] for record in records if record["loss"] is not None and not record["skipped"]]
    return fmean(losses[-TAIL_STEPS:]) if losses else None


def _evaluation_summary(result: Mapping[str, Any] | None, previous: int | None) -> EvaluationSummary | None:
    if result is None:
        return None
    return EvaluationSummary(
        held_out=(result.get("held_out") or {}).get("loss"),
        beyond=None if previous is None else loss_beyond(result, previous),
        needle=needle_score(result),
    )


def _read_records(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break  # the run is being written right now, or was killed while it wrote this line
            record = _parse_record(line, place=f"{path}:{number}")
            if records and record["step"] <= records[-1]["step"]:
                raise RunError(
                    f"{path}:{number}: step {record['step']} follows step {records[-1]['step']}; steps must "
                    "grow, so two runs have written into this file; give each its own name="
                )
            records.append(record)
    return records


def _parse_record(line: str, *, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{place}: the line is not JSON ({error}); remove it and try again") from error
    required = ("step", "stage", "tokens", "stage_tokens", "loss", "skipped", "timing")
    missing = required if not isinstance(record, dict) else [key for key in required if key not in record]
    if missing:
        raise RunError(
            f"{place}: the line is not a step record, it lacks {', '.join(missing)}; remove it and try again"
        )
    return record


def _read_evaluations(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    evaluations: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            evaluations[result["stage"], result["when"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not an evaluation ({error!r}); remove it or evaluate again") from error
    return evaluations
