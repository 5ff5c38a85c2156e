"""Time DualPipeV with and without hiding the exchange of tokens, over four gloo processes.

    python -m tests.bench.overlap --delay-ms 100

Two pipeline ranks, whose experts are spread over two processes each; every stage is one mixture-of-experts
layer. Processes of one machine exchange tokens in no time, so a wire is put between them: rows sent by an
all-to-all count as arrived `--delay-ms` after it was started (their counts, which are small, travel at once).
Steps with and without overlap alternate. Prints one JSON line; `ratio` is the median step time with overlap
over that without.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parallel.config import Schedule
from parallel.groups import Group, Pending
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.schedule import Batch
from tests.distributed import run_ranks
from tests.model.small import small
from tests.parallel.pipeline.models import RankSchedule, batch_of

LAYOUT = Layout(pp=2, dp_shard=2, ep=2)
CONFIG = small(num_layers=4, num_dense_layers=0, init_std=0.2)


class Late(Pending):
    """A result that is complete at `arrival`, by the clock of time.perf_counter, and not before."""

    def __init__(self, pending: Pending, arrival: float) -> None:
        self.pending, self.arrival = pending, arrival

    def wait(self) -> Tensor:
        """Sleep until the result has arrived, and return it."""
        result = self.pending.wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))
        return result


class Wire(Group):
    """A group whose all-to-alls of rows take `delay` seconds at least."""

    def __init__(self, group: Group, delay: float) -> None:
        super().__init__(group.name, group.ranks, rank=group.rank, handle=group.handle, trace=group.trace)
        self.delay = delay

    def start_all_to_all(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Pending:
        """Start the exchange; rows arrive after the delay, counts at once."""
        pending = super().start_all_to_all(x, received, sent)
        return Late(pending, time.perf_counter() + self.delay) if x.is_floating_point() else pending


def main_model_only(batch: Batch) -> Batch:
    """Return the batch without the tokens of the MTP depth."""
    tokens_BKS, labels_BKS = batch.tokens_BKS[:, :1], batch.labels_BKS[:, :1]
    return replace(batch, tokens_BKS=tokens_BKS, labels_BKS=labels_BKS, valid_K=batch.valid_K[:1])


def run_rank(rank: int, delay: float, microbatches: int, steps: int) -> dict[str, list[float]]:
    """Return the times of this rank's steps, alternating with and without overlap, after one of each."""
    mesh = build_mesh(LAYOUT, rank=rank)
    wire = Wire(mesh.ep, delay)
    batch = main_model_only(batch_of(microbatches * LAYOUT.dp))[mesh.dp_rank * microbatches :][:microbatches]
    runs = {
        name: RankSchedule(CONFIG, mesh, Schedule.dualpipev, overlap=name == "with", ep=wire)
        for name in ("with", "without")
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(1 + steps):
        for name, run in runs.items():
            mesh.world.barrier()
            start = time.perf_counter()
            run.step(batch)
            mesh.world.barrier()
            if step:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Run the steps and print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=100.0, help="time that rows travel")
    parser.add_argument("--microbatches", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    times = run_ranks(LAYOUT.world_size, run_rank, args.delay_ms / 1000, args.microbatches, args.steps)[0]
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {
        "bench": "overlap",
        "schedule": "dualpipev",
        "layout": "pp2 ep2",
        "processes": LAYOUT.world_size,
        "microbatches": args.microbatches,
        "delay_ms": args.delay_ms,
        "step_s_with": round(medians["with"], 3),
        "step_s_without": round(medians["without"], 3),
        "ratio": round(medians["with"] / medians["without"], 3),
        "ratios": [round(a / b, 3) for a, b in zip(times["with"], times["without"], strict=True)],
        "torch": torch.__version__,
        "load1": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
