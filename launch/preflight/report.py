"""What the checks found, for people (tables) and for programs (JSON)."""

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from launch.preflight.groups import GB, Axis
from launch.preflight.site import Outcome, spans

STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each check."""
    table = Table(title="preflight", box=SIMPLE_HEAD)
    table.add_column("check", style="cyan", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for each in outcomes:
        told = f"{len(each.problems)} × failed" if each.problems else each.status
        table.add_row(each.check, f"[{STYLES[each.status]}]{told}[/]", escape(each.detail))
    return table


def axis_table(axes: Sequence[Axis]) -> Table:
    """Return a row for each operation on each axis; bandwidths in GB/s."""
    table = Table(title="process groups", box=SIMPLE_HEAD)
    table.add_column("axis", style="cyan", no_wrap=True)
    for name in (
        "operation",
        "groups",
        "of ranks",
        "time, ms",
        "algbw, GB/s",
        "busbw, GB/s",
        "slowest busbw",
    ):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for axis in axes:
        median, slowest = axis.median, axis.slowest
        table.add_row(
            axis.name,
            axis.operation,
            str(len(axis.groups)),
            str(len(median.ranks)),
            f"{median.seconds * 1e3:.3g}",
            f"{median.algbw / GB:.3g}",
            f"{median.busbw / GB:.3g}",
            f"{slowest.busbw / GB:.3g} (ranks {spans(slowest.ranks)})",
        )
    return table


def as_json(outcomes: Sequence[Outcome], axes: Sequence[Axis], hosts: Sequence[str]) -> str:
    """Return one JSON object: is all well, the checks, the groups (bandwidths in bytes a second)."""
    groups: list[dict[str, Any]] = [
        {
            "axis": axis.name,
            "operation": axis.operation,
            "ranks": list(each.ranks),
            "bytes": each.num_bytes,
            "seconds": each.seconds,
            "algbw": each.algbw,
            "busbw": each.busbw,
            "wrong": each.wrong,
        }
        for axis in axes
        for each in axis.groups.values()
    ]
    checks = [
        {"check": each.check, "status": each.status, "seen": each.detail, "problems": list(each.problems)}
        for each in outcomes
    ]
    healthy = not any(each.problems for each in outcomes)
    return json.dumps(
        {"healthy": healthy, "hosts": list(hosts), "checks": checks, "groups": groups}, indent=1
    )
