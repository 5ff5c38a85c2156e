"""Run the layouts of the matrix, those of one number of processes together, and yield its rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from parallel.config import ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from train.parity.compare import Row, compare
from train.parity.layouts import NamedLayout
from train.parity.task import Record, run_task


def run_matrix(layouts: Sequence[NamedLayout]) -> Iterator[Row]:
    """Yield the row of each layout, by number of processes. RuntimeError when a process fails."""
    reference = run_task(0, Layout(), ParallelConfig())
    for world_size in sorted({layout.world_size for layout in layouts}):
        chosen = [layout for layout in layouts if layout.world_size == world_size]
        for layout in chosen:
            started = time.perf_counter()
            records = _run(world_size, layout)
            row = compare(layout.name, records, reference)
            yield replace(row, seconds=time.perf_counter() - started)


def _run(world_size: int, layout: NamedLayout) -> list[Record]:
    if world_size == 1:
        return [run_task(0, layout.layout, layout.parallel)]
    return run_ranks(world_size, run_task, layout.layout, layout.parallel)
