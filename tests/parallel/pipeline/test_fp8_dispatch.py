"""Under every schedule, FP8 experts do not notice whether their rows travelled as codes or as numbers.

The same layout is run both ways: losses and every gradient must be equal bit for bit, while fewer bytes leave
each process. That FP8 experts give the same wherever they live is tested on a layer, in test_expert.py and
test_two_hop.py, where one process can be given the same tiles.
"""

import torch
from torch import Tensor

from model.config import Recompute
from parallel.config import Dispatcher, Schedule
from parallel.groups import CollectiveCall
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.schedule import LocalSums
from tests.distributed import run_ranks
from tests.parallel.pipeline.models import RankSchedule, batch_of, config_of, gradients

HIDDEN = 160  # a tile, and a part of one
CONFIG = config_of(4, hidden_size=HIDDEN)
Case = tuple[Schedule, Recompute, bool, Dispatcher]
"""Schedule, recompute mode, overlap, dispatcher."""


def step(mesh: Mesh, case: Case, *, fp8_dispatch: bool) -> tuple[dict[str, Tensor], LocalSums, int]:
    """Return gradients, sums, and bytes sent over the experts' axes."""
    schedule, recompute, overlap, dispatcher = case
    runner = RankSchedule(
        CONFIG,
        mesh,
        schedule,
        recompute=recompute,
        overlap=overlap,
        dispatcher=dispatcher,
        fp8_dispatch=fp8_dispatch,
    )
    calls: list[CollectiveCall] = []
    mesh.world.trace.listeners.append(calls.append)
    sums = runner.step(batch_of(8)[mesh.dp_rank * 4 :][:4])
    mesh.world.trace.listeners.remove(calls.append)
    sent = sum(call.num_bytes for call in calls if call.operation == "all_to_all")
    return gradients(runner.chunks.values(), mesh), sums, sent


def compare(rank: int, cases: list[Case]) -> None:
    mesh = build_mesh(Layout(pp=2, dp_shard=2, ep=2, ep_nodes=2), rank=rank)
    for case in cases:
        (expected, sums, number_bytes), (ours, coded_sums, coded_bytes) = (
            step(mesh, case, fp8_dispatch=coded) for coded in (False, True)
        )
        assert ours.keys() == expected.keys()
        different = [name for name, gradient in expected.items() if not torch.equal(ours[name], gradient)]
        assert different == [], case
        assert all(gradient.any() for gradient in expected.values()), case
        assert torch.equal(sums.loss_sums_K, coded_sums.loss_sums_K)
        # computed in FP32: two of four exchanges, and one that `full` repeats, save 4 bytes a number for 1,
        # and 2 more for the scales of a row; nothing else changes
        assert (number_bytes - coded_bytes) % (3 * HIDDEN - 2) == 0
        assert coded_bytes < 0.75 * number_bytes


def test_every_schedule() -> None:
    cases = [(schedule, Recompute.none, False, Dispatcher.alltoall) for schedule in Schedule]
    cases += [
        (Schedule.dualpipev, Recompute.none, True, Dispatcher.alltoall),
        (Schedule.dualpipev, Recompute.deepseek, True, Dispatcher.two_hop),
        (Schedule.dualpipev, Recompute.full, True, Dispatcher.two_hop),
    ]
    run_ranks(4, compare, cases)
