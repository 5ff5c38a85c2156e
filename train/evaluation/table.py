"""One evaluation as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the content of one evaluations/*.json."""
    console.print(
        f"{result['stage']}: step {result['step']:,}, {result['tokens']:,} tokens seen, "
        f"measured at length {result['seq_len']:,}"
    )
    console.print(_losses(result["held_out"]), _positions(result["by_position"]))
    needle = result["needle"]
    if needle["grid"]:
        console.print(_grid(needle))
    else:
        console.print("needle: every length tried is too short for needle and question")


def _losses(held_out: Mapping[str, Any]) -> Table:
    table = Table(title=f"held-out loss over {held_out['num_tokens']:,} tokens", title_justify="left")
    for name in ("prediction by", "nats per token", "above the model"):
        table.add_column(name, justify="left" if name == "prediction by" else "right")
    for label, key in (
        ("model", "loss"),
        ("bigram", "bigram"),
        ("unigram", "unigram"),
        ("uniform", "uniform"),
    ):
        difference = "" if key == "loss" else f"{held_out[key] - held_out['loss']:+.4f}"
        table.add_row(label, f"{held_out[key]:.4f}", difference)
    return table


def _positions(parts: list[Mapping[str, Any]]) -> Table:
    table = Table(title="loss by position", title_justify="left")
    table.add_column("positions", justify="right")
    table.add_column("nats per token", justify="right")
    for part in parts:
        table.add_row(f"{part['from']:,} - {part['to'] - 1:,}", f"{part['loss']:.4f}")
    return table


def _grid(needle: Mapping[str, Any]) -> Table:
    title = f"needle: share of keys found (chance {needle['chance']:.2f}), and their lead in nats"
    table = Table(title=title, title_justify="left")
    table.add_column("length / depth", justify="right")
    for depth in needle["depths"]:
        table.add_column(f"{depth:.0%}", justify="right")
    for length, scores, leads in zip(needle["lengths"], needle["grid"], needle["margin"], strict=True):
        cells = [f"{score:.2f} ({lead:+.2f})" for score, lead in zip(scores, leads, strict=True)]
        table.add_row(f"{length:,}", *cells)
    return table
