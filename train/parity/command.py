"""The parity matrix for people and for programs: a progress bar, a table, a JSON file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from model.config import Gemm
from parallel.checks import layout_problems
from train.errors import RunError
from train.parity.compare import TOLERANCE, Row
from train.parity.layouts import DEFAULT, NamedLayout, parse
from train.parity.matrix import run_matrix
from train.parity.task import FP8, MODEL, PLAIN, SEQUENCES, Task

TABLE_WIDTH = 120


TASKS = {Gemm.compute: PLAIN, Gemm.fp8_reference: FP8}
"""What every layout repeats, by what multiplies inside the blocks."""


def prove(names: Sequence[str] | None, *, gemm: Gemm, json_file: Path | None) -> bool:
    """Run layouts (the default matrix without names), print the table, return whether every row passed.

    Raises:
        RunError: listing every layout that is not understood or cannot be run, before anything starts.
    """
    task = TASKS[gemm]
    layouts = chosen_layouts(names or DEFAULT, task)
    console = _console()
    rows = _run(layouts, task, console)
    console.print(table(rows, task))
    failed = [row.layout for row in rows if not row.passed]
    told = f"FAILED: {', '.join(failed)}" if failed else "every gradient of every layout agrees"
    wider = sum(row.tolerance.gradient > TOLERANCE for row in rows)
    limits = f"{TOLERANCE:g}" + (f", {wider} of them within what FP8 codes under cp force" if wider else "")
    console.print(f"{len(rows) - len(failed)} of {len(rows)} layouts within {limits}; {told}", soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps(as_json(rows), indent=1) + "\n", encoding="utf-8")
    return not failed


def chosen_layouts(names: Sequence[str], task: Task) -> list[NamedLayout]:
    """Return the layouts of these names. RunError listing every name that cannot be run, with the reasons."""
    layouts: list[NamedLayout] = []
    found: list[str] = []
    for name in names:
        try:
            layout = parse(name)
        except ValueError as error:
            found.append(str(error))
            continue
        found += layout_problems(
            layout.parallel,
            model=MODEL,
            world_size=layout.world_size,
            batch_sizes=[SEQUENCES],
            seq_len=task.seq_len,
            path=name,
        )
        layouts.append(layout)
    if found:
        raise RunError("these layouts cannot be proved:\n" + "\n".join(f"  {line}" for line in found))
    return layouts


def _console() -> Console:
    """Return a console as wide as the table: a file has no width, and a terminal may be narrow."""
    console = Console()
    return console if console.width >= TABLE_WIDTH else Console(width=TABLE_WIDTH)


def _run(layouts: list[NamedLayout], task: Task, console: Console) -> list[Row]:
    columns = (TextColumn("{task.description:36}"), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("one process, for comparison", total=len(layouts))
        for row in run_matrix(layouts, task):
            rows.append(row)
            progress.update(bar, advance=1, description=f"proved {row.layout}")
            if not console.is_terminal:
                verdict = "ok" if row.passed else "FAILED"
                print(f"{len(rows)}/{len(layouts)} {row.layout}: {verdict}", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row], task: Task) -> Table:
    """Return the matrix as a table: relative distances from one process, the largest over all steps."""
    steps = "two steps, FP32" if task is PLAIN else "one step, FP8 products, all else FP32"
    made = Table(title=f"Relative distance from one process over {steps}", box=SIMPLE_HEAD)
    made.add_column("layout", overflow="fold")
    for name in ("ranks", "losses", "gradient"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("worst gradient is of", overflow="fold")
    for name in ("norm", "bias", "weights", ""):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row.layout,
            str(row.world_size),
            f"{max(row.loss, row.balance_loss):.1e}",
            f"{row.gradient.distance:.1e}",
            row.gradient.name.removesuffix(".weight"),
            f"{row.grad_norm:.1e}",
            f"{row.bias:.1e}" if row.load else "load",
            f"{row.parameter.distance:.1e}",
            "ok" if row.passed else "[bold red]FAIL[/]",
        )
    return made


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the matrix as plain values."""
    return {
        "tolerance": TOLERANCE,
        "passed": all(row.passed for row in rows),
        "rows": [asdict(row) | {"passed": row.passed} for row in rows],
    }
