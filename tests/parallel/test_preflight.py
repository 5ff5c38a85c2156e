"""What processes find out about each other: gathered values, clocks, collectives of every group."""

import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from parallel.checks import layout_of
from parallel.config import Context, Dispatcher, ParallelConfig
from parallel.groups import Group, Pending
from parallel.mesh import build_mesh, single_process
from parallel.preflight.clocks import clock_offsets
from parallel.preflight.exercise import Exercise, exercise, exercise_all
from parallel.preflight.gather import gather_json
from parallel.preflight.operations import OPERATIONS, values
from parallel.preflight.uses import uses, world_uses
from tests.distributed import run_ranks

CPU = torch.device("cpu")
SKEW_S = 37.5
BYTES = 4096


def everything_at_once(rank: int) -> dict[str, Any]:
    """Use every part on four processes."""
    world = Group("world", range(4), rank=rank)
    skew = SKEW_S if rank == 2 else 0.0
    tp_cp = ParallelConfig(tp=2, cp=2, context=Context.ulysses)
    hops = ParallelConfig(ep=4, dispatcher=Dispatcher.two_hop, node_size=2)
    pipeline = ParallelConfig(pp=4)
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, config in {"tp_cp": tp_cp, "hops": hops, "pipeline": pipeline}.items():
        mesh = build_mesh(layout_of(config, 4), rank=rank)
        found = exercise_all(uses(mesh, config), world=mesh.world, device=CPU, num_bytes=BYTES)
        seen[name] = [asdict(each) | {"busbw": each.busbw} for each in found]
    return {
        "gathered": gather_json({"rank": rank, "text": "ü" * rank}, world),
        "offsets": [asdict(o) for o in clock_offsets(world, [1, 2], clock=lambda: time.time() + skew)],
        "seen": seen,
        "world": [asdict(e) for e in exercise_all(world_uses(world), world=world, device=CPU, num_bytes=400)],
    }


def test_four_processes_meet_in_every_way() -> None:
    reports = run_ranks(4, everything_at_once)
    for report in reports:
        assert report["gathered"] == [{"rank": r, "text": "ü" * r} for r in range(4)]
    first, second = reports[0]["offsets"]
    assert abs(first["seconds"]) <= first["error_s"]
    assert abs(second["seconds"] - SKEW_S) <= second["error_s"] < 1.0
    assert (first["rank"], second["rank"]) == (1, 2)
    assert not any(report["offsets"] for report in reports[1:])
    for report in reports:
        every = [each for found in report["seen"].values() for each in found] + report["world"]
        assert all(each["wrong"] == 0 and not each["error"] and each["seconds"] > 0 for each in every)
    tried = {
        name: [(each["group"], each["operation"], each["ranks"]) for each in found]
        for name, found in reports[3]["seen"].items()
    }
    everybody = (0, 1, 2, 3)
    assert tried["tp_cp"] == [
        ("world", "all_reduce", everybody),
        ("cp", "all_to_all", (1, 3)),
        ("tp", "all_reduce", (2, 3)),
        ("sequence", "all_gather", everybody),
        ("sequence", "reduce_scatter", everybody),
        ("dp_cp", "reduce_scatter", (1, 3)),
        ("dp_cp", "all_gather", (1, 3)),
    ]
    assert tried["hops"] == [
        ("world", "all_reduce", everybody),
        ("ep_inter", "all_to_all", (1, 3)),
        ("ep_intra", "all_to_all", (2, 3)),
        ("dp_cp", "reduce_scatter", everybody),
        ("dp_cp", "all_gather", everybody),
    ]
    assert tried["pipeline"] == [
        ("world", "all_reduce", everybody),
        ("pp", "relay", everybody),
        ("ends", "reduce_scatter", (0, 3)),
        ("ends", "all_gather", (0, 3)),
    ]
    assert {each["operation"] for each in reports[0]["world"]} == set(OPERATIONS)


class Corrupted(Group):
    """A group over whose wire one process sends other bytes than it was given; in a gather once only."""

    gathers = 0

    def start_all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Pending:
        self.gathers += 1
        errs = self.rank == 2 and self.gathers == 1
        return super().start_all_gather(x + (torch.arange(len(x)) == 3) * errs, out)

    def start_all_reduce(self, x: torch.Tensor, **how: Any) -> Pending:
        return super().start_all_reduce(x.add_((torch.arange(len(x)) == 3) * (self.rank == 2)), **how)

    def start_reduce_scatter(self, x: torch.Tensor) -> Pending:
        raise RuntimeError("no route\nto host")


def corrupted(rank: int) -> list[Exercise]:
    group = Corrupted("world", range(4), rank=rank)
    names = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter")
    return [exercise(name, group, device=CPU, num_bytes=BYTES) for name in names]


def test_wrong_values_are_found_and_their_sender_named() -> None:
    for gathered, reduced, exchanged, failed in run_ranks(4, corrupted):
        assert (gathered.wrong, gathered.senders) == (1, (2,))
        assert (reduced.wrong, reduced.senders) == (1, ())
        assert (exchanged.wrong, exchanged.senders, exchanged.error) == (0, (), "")
        assert (failed.error, failed.seconds, failed.busbw) == ("RuntimeError: no route", 0.0, 0.0)


@pytest.mark.parametrize("size", [2, 5, 8, 19])
def test_expected_values_are_those_of_a_plain_loop(size: int) -> None:
    """The closed forms against the definition in the module's docstring."""
    count = 3 * size
    table = torch.tensor([[(i + 3 * p) % 8 for i in range(count)] for p in range(size)]).float()
    for place in (0, size - 1):
        group = Group("any", range(size), rank=place)
        mine = slice(3 * place, 3 * place + 3)
        wanted = {
            "all_reduce": table.sum(0),
            "reduce_scatter": table.sum(0)[mine],
            "all_gather": table[:, :3].flatten(),
            "all_to_all": table[:, mine].flatten(),
            "relay": table[0] + place,
        }
        for name, operation in OPERATIONS.items():
            torch.testing.assert_close(operation.expected(group, count, CPU), wanted[name], rtol=0, atol=0)
    assert values(1, 2, 2, CPU).tolist() == [5.0, 6.0]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    """The factors of its PERFORMANCE.md for eight ranks."""
    factors = {"all_reduce": 14 / 8, "reduce_scatter": 7 / 8, "all_gather": 7 / 8, "all_to_all": 7 / 8}
    for operation, factor in factors.items():
        took = Exercise(group="dp", operation=operation, ranks=tuple(range(8)), num_bytes=800, seconds=2.0)
        assert took.algbw == 400
        assert took.busbw == pytest.approx(400 * factor)


def test_one_process_has_nothing_to_try() -> None:
    mesh = single_process()
    planned = uses(mesh, ParallelConfig())
    assert not list(exercise_all(planned, world=mesh.world, device=CPU, num_bytes=BYTES))
    assert gather_json([1, None], mesh.world) == [[1, None]]
    assert clock_offsets(mesh.world, []) == []
