"""The table a run ends with: what every stage took, and what it changed."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from train.logs.console import duration, quantity
from train.reporting.run_data import RunData, StageSummary, read_run, stage_summaries


def closing_table(run_dir: Path) -> Table:
    """Return a row per stage with its losses and needle score before and after, and a line on the baseline.

    Raises RunError when a file of the run is damaged.
    """
    run = read_run(run_dir)
    table = Table(
        title=f"{run.config.name}: what the run came to",
        caption=_baseline_line(run),
        caption_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("stage", style="cyan", no_wrap=True)
    for name in (
        "length",
        "tokens",
        "steps",
        "time",
        "train loss",
        "held out",
        "beyond previous",
        "needle",
    ):
        # Cells may fold: a log file has 80 columns, and a figure cut off there would be lost.
        table.add_column(name, justify="right", overflow="fold", min_width=max(map(len, name.split())))
    for summary in stage_summaries(run):
        table.add_row(
            summary.name,
            f"{summary.seq_len:,}",
            quantity(summary.tokens),
            f"{summary.steps:,}",
            duration(summary.seconds),
            _number(summary.final_loss, ".3f"),
            _change(summary, "held_out", ".3f"),
            _change(summary, "beyond", ".3f"),
            _change(summary, "needle", ".2f"),
        )
    return table


def _baseline_line(run: RunData) -> str:
    held_out = (run.last_evaluation() or {}).get("held_out")
    if not held_out or held_out.get("loss") is None:
        return "No held-out loss was measured."
    below = held_out["unigram"] - held_out["loss"]
    where = f"{below:.2f} nats under" if below >= 0 else f"{-below:.2f} nats ABOVE"
    return (
        f"Held-out loss {held_out['loss']:.3f} ends {where} the unigram baseline ({held_out['unigram']:.3f})."
    )


def _change(summary: StageSummary, key: str, spec: str) -> str:
    before, after = (getattr(part, key, None) for part in (summary.before, summary.after))
    if before is None and after is None:
        return "–"
    return f"{_number(before, spec)} → {_number(after, spec)}"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
