"""Run the layouts of the matrix, those of few processes first, and yield its rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from parallel.config import Engine, ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from train.engines.choose import deepspeed_engine
from train.parity.compare import Row, compare
from train.parity.layouts import NamedLayout
from train.parity.task import CPU, Record, run_task


def run_matrix(layouts: Sequence[NamedLayout]) -> Iterator[Row]:
    """Yield the row of each layout, by number of processes. RuntimeError when a process fails."""
    if any(layout.parallel.engine is Engine.deepspeed for layout in layouts):
        deepspeed_engine(CPU)  # once here, rather than in every process that is forked
    reference = run_task(0, Layout(), ParallelConfig())
    for layout in sorted(layouts, key=lambda layout: layout.world_size):
        started = time.perf_counter()
        row = compare(layout.name, run_layout(layout), reference)
        yield replace(row, seconds=time.perf_counter() - started)


def run_layout(layout: NamedLayout) -> list[Record]:
    """Return what each process of a layout recorded."""
    if layout.world_size == 1:
        return [run_task(0, layout.layout, layout.parallel)]
    return run_ranks(layout.world_size, run_task, layout.layout, layout.parallel)
