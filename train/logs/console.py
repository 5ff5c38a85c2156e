"""The run on the console: a live progress bar on a terminal, plain lines in a log file.

Both show the stage, the step, tokens, loss, learning rate, gradient norm, speed and the time that remains;
both print stage changes, skipped steps, evaluations and messages as lines that stay.
"""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from train.config import StageConfig
from train.reporting.run_data import needle_score

WIDE_TERMINAL = 140
"""Columns from which the progress line has room for every figure."""


class ConsoleSink:
    """Prints a run: every `every` steps on plain output; each step on a terminal, where a bar is redrawn."""

    def __init__(
        self, console: Console, *, every: int, total_tokens: int, stages: Mapping[str, StageConfig]
    ) -> None:
        self._console = console
        self._every = every
        self._total_tokens = total_tokens
        self._stages = stages
        self._stage: str | None = None
        self._speed = _Speed()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._printed_step: int | None = None
        self._last: dict[str, Any] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Show one step, and the beginning of a stage when it is the stage's first."""
        if record["stage"] != self._stage:
            # A log file gets the last step of a stage even when `every` does not divide it.
            self._print_last()
            self._announce(record)
        self._speed.add(record)
        if record["skipped"]:
            self.message(
                f"step {record['step']:,} skipped: its loss or gradient was not finite; nothing was updated",
                style="yellow",
            )
        self._last = record
        if self._console.is_terminal:
            self._redraw(record)
        elif record["step"] % self._every == 0:
            self._print_last()

    def evaluation(self, result: dict[str, Any]) -> None:
        """Print the held-out loss of one evaluation beside the unigram baseline, and the needle score."""
        parts = []
        if held_out := result.get("held_out"):
            parts.append(f"held-out loss {held_out['loss']:.3f} (unigram {held_out['unigram']:.3f})")
        if (score := needle_score(result)) is not None:
            parts.append(f"needle score {score:.2f}")
        self.message(
            f"evaluated {result['when']} {result['stage']}: " + (", ".join(parts) or "nothing to measure")
        )

    def message(self, text: str, *, style: str = "dim") -> None:
        """Print one line, above the progress bar where there is one."""
        self._print_last()
        self._console.print(f"  {escape(text)}", style=style, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Print what has not been printed and give the terminal back."""
        self._print_last()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _announce(self, record: dict[str, Any]) -> None:
        self._stage = record["stage"]
        text = f"stage {record['stage']} · sequences of {record['seq_len']:,} tokens"
        stage = self._stages.get(record["stage"])
        if stage is not None:
            text += f" · {quantity(stage.num_tokens)} tokens"
        if stage is not None and stage.yarn is not None:
            text += f" · YaRN ×{stage.yarn.factor:g} over {stage.yarn.original_length:,}"
        self._console.print(f"── {escape(text)} ──", style="bold cyan", highlight=False, soft_wrap=True)

    def _print_last(self) -> None:
        """On plain output, print the newest step unless it has been printed."""
        if self._console.is_terminal or self._last is None or self._last["step"] == self._printed_step:
            return
        self._printed_step = self._last["step"]
        self._console.print(self._line(self._last), markup=False, highlight=False, soft_wrap=True)

    def _line(self, record: dict[str, Any]) -> str:
        done = min(1.0, record["tokens"] / max(1, self._total_tokens))
        return (
            f"{record['stage']} step {record['step']:,} · {quantity(record['tokens'])} tokens ({done:.0%}) · "
            + self._figures(record)
        )

    def _figures(self, record: dict[str, Any]) -> str:
        mtp = "".join(f" · mtp {_number(loss, '.3f')}" for loss in record["mtp_loss"][:1])
        remaining = self._speed.seconds_for(self._total_tokens - record["tokens"])
        return (
            f"loss {_number(record['loss'], '.3f')}{mtp} · lr {record['lr']:.2e} · "
            f"grad norm {_number(record['grad_norm'], '.2f')} · "
            f"{quantity(self._speed.tokens_per_second)} tok/s · ETA {duration(remaining)}"
        )

    def _short_figures(self, record: dict[str, Any]) -> str:
        remaining = self._speed.seconds_for(self._total_tokens - record["tokens"])
        speed = quantity(self._speed.tokens_per_second)
        return f"loss {_number(record['loss'], '.3f')} · {speed} tok/s · ETA {duration(remaining)}"

    def _redraw(self, record: dict[str, Any]) -> None:
        wide = self._console.width >= WIDE_TERMINAL
        if self._progress is None:
            self._progress = Progress(
                TextColumn("[bold cyan]{task.description}"),
                BarColumn(bar_width=24 if wide else 8),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=self._total_tokens, figures="")
            self._progress.start()
        all_figures = f"{quantity(record['tokens'])} tokens · {self._figures(record)}"
        self._progress.update(
            self._task,
            completed=record["tokens"],
            description=escape(f"{record['stage']} step {record['step']:,}"),
            figures=escape(all_figures if wide else self._short_figures(record)),
        )


class _Speed:
    """Tokens per second over the recent past: a mean in which a step counts half after about 14 more."""

    def __init__(self, *, memory: float = 0.95) -> None:
        self._memory = memory
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, record: dict[str, Any]) -> None:
        self._tokens = self._memory * self._tokens + record["batch_size"] * record["seq_len"]
        self._seconds = self._memory * self._seconds + record["timing"]["seconds"]

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def seconds_for(self, tokens: int) -> float:
        return max(0, tokens) / self.tokens_per_second if self._tokens and self._seconds else math.inf


def quantity(value: float) -> str:
    """Return a count in at most four digits and a unit: 950, 12.3K, 4.19M, 14.8T."""
    for factor, unit in ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "B")):
        # Round first: 999,700 is 1M, not 1000K.
        rounded = float(f"{value / factor:.3g}")
        if abs(rounded) < 1000:
            return f"{rounded:g}{unit}"
    return f"{value / 1e12:,.3g}T" if abs(value) < 1e15 else f"{value / 1e12:,.0f}T"


def duration(seconds: float) -> str:
    """Return a time as people say it: 42s, 3m 20s, 5h 07m, 12d 4h; "?" when it is unknown."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600}h"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, spec)
