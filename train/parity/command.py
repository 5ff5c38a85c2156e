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

from parallel.checks import layout_problems
from train.errors import RunError
from train.parity.compare import TOLERANCE, Row
from train.parity.layouts import DEFAULT, NamedLayout, parse
from train.parity.matrix import run_matrix
from train.parity.task import MODEL, SEQ_LEN, SEQUENCES

TABLE_WIDTH = 120


def prove(names: Sequence[str] | None, *, json_file: Path | None) -> bool:
    """Run layouts (the default matrix without names), print the table, return whether every row passed.

    Raises:
        RunError: listing every layout that is not understood or cannot be run, before anything starts.
    """
    layouts = chosen_layouts(names or DEFAULT)
    console = _console()
    rows = _run(layouts, console)
    console.print(table(rows))
    failed = [row.layout for row in rows if not row.passed]
    told = f"FAILED: {', '.join(failed)}" if failed else "every gradient of every layout agrees"
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} layouts within {TOLERANCE:g}; {told}", soft_wrap=True
    )
    if json_file:
        json_file.write_text(json.dumps(as_json(rows), indent=1) + "\n", encoding="utf-8")
    return not failed


def chosen_layouts(names: Sequence[str]) -> list[NamedLayout]:
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
            seq_len=SEQ_LEN,
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


def _run(layouts: list[NamedLayout], console: Console) -> list[Row]:
    columns = (TextColumn("{task.description:36}"), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("one process, for comparison", total=len(layouts))
        for row in run_matrix(layouts):
            rows.append(row)
            progress.update(task, advance=1, description=f"proved {row.layout}")
            if not console.is_terminal:
                verdict = "ok" if row.passed else "FAILED"
                print(f"{len(rows)}/{len(layouts)} {row.layout}: {verdict}", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the matrix as a table: relative distances from one process, the largest over both steps."""
    made = Table(title="Relative distance from one process over two steps, FP32", box=SIMPLE_HEAD)
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
