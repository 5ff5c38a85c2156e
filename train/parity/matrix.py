"""Run the layouts of the matrix, those of few processes first, and yield its rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from parallel.config import Context, Engine, ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from train.engines.choose import deepspeed_engine
from train.parity.compare import Row, Tolerance, compare
from train.parity.layouts import NamedLayout
from train.parity.task import CPU, FP8, PLAIN, Record, Task, run_task

QUANTISED_BEFORE_SUMMED = Tolerance(gradient=0.5, grad_norm=2e-2, parameter=3e-2)
"""For FP8 where cp ranks gather latents: each makes keys and values of all tokens and gets the gradient of
its own queries' use of them. One process quantises the sum of these gradients, cp ranks each their own part,
and a sum of rounded numbers is not the rounded sum: an element moves by up to 1/16 of a part, and what
follows it in the backward pass with it. The forward pass is the same, so losses and loads are held like all
others, and so is everything where `wkv_a` and `wkv_b` multiply in FP32, as a test does to show the cause.
Ulysses moves heads and not gradients of shared keys, and is as close as the rest."""


def run_matrix(layouts: Sequence[NamedLayout], task: Task = PLAIN) -> Iterator[Row]:
    """Yield the row of each layout, by number of processes. RuntimeError when a process fails."""
    if any(layout.parallel.engine is Engine.deepspeed for layout in layouts):
        deepspeed_engine(CPU)  # once here, rather than in every process that is forked
    reference = run_task(0, Layout(), ParallelConfig(), task)
    for layout in sorted(layouts, key=lambda layout: layout.world_size):
        started = time.perf_counter()
        row = compare(layout.name, run_layout(layout, task), reference)
        seconds = time.perf_counter() - started
        yield replace(row, tolerance=tolerance(layout, task), seconds=seconds)


def run_layout(layout: NamedLayout, task: Task = PLAIN) -> list[Record]:
    """Return what each process of a layout recorded."""
    if layout.world_size == 1:
        return [run_task(0, layout.layout, layout.parallel, task)]
    return run_ranks(layout.world_size, run_task, layout.layout, layout.parallel, task)


def tolerance(layout: NamedLayout, task: Task) -> Tolerance:
    """Return how far a layout may be from one process."""
    gathers = layout.parallel.cp > 1 and layout.parallel.context is Context.gather
    return QUANTISED_BEFORE_SUMMED if task is FP8 and gathers else Tolerance()
