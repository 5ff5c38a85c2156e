"""The dry run as a command, and its parts: routing, FLOPs, fewer microbatches, kinds of ranks, advice."""

import json

import pytest
import torch

from launch.dryrun.advice import advise
from launch.dryrun.command import _parser as parser
from launch.dryrun.command import main, request_of
from launch.dryrun.everyone import kinds_of_ranks, run_everyone, total_parameters
from launch.dryrun.fake import TILES, DryMode, wide_tiles
from launch.dryrun.job import RankReport, Request
from launch.dryrun.memory import Kind, Memory, Moment
from launch.dryrun.rank import run_rank
from launch.dryrun.routing import EvenRouting
from launch.dryrun.shortened import enough_microbatches
from model.cost import flops_per_token, layer_flops_per_token, num_parameters
from parallel.config import Dispatcher, ParallelConfig, Schedule
from parallel.pipeline.in_flight import held_at_once
from parallel.traffic import exchanged_bytes, hops, row_bytes_of
from tests.model.small import small
from train.errors import RunError


def asked(*arguments: str) -> Request:
    """Return the request of a command line."""
    return request_of(parser().parse_intermixed_args(arguments))


def test_a_mode_answers_the_host_and_restores_the_tiles() -> None:
    seen: list[str] = []
    before = [getattr(module, name) for module, name, _ in TILES]
    with wide_tiles(), DryMode([lambda func, *_: seen.append(func._schema.name)]):
        x = torch.empty(1 << 40, 1 << 10)  # a petabyte
        y = x * 2
        x.add_(y)
        done = list(seen)
        assert bool(torch.isfinite(y.sum()))
        assert float(y.sum()) == 1.0
        assert int(torch.tensor(5)) == 5
        assert [getattr(module, name) for module, name, _ in TILES] == [size for *_, size in TILES]
    assert done == ["aten::empty", "aten::mul", "aten::add_"]
    assert [getattr(module, name) for module, name, _ in TILES] == before


def test_memory_tells_kinds_by_what_becomes_of_them() -> None:
    memory = Memory(lambda: "layer")
    with DryMode([memory]):
        weight = torch.empty(100, dtype=torch.uint8)
        memory.name(Kind.WEIGHTS, [weight])
        memory.start_measuring()
        memory.enter(Moment("forward", forward=True))
        saved, dropped = torch.empty(40, dtype=torch.uint8), torch.empty(7, dtype=torch.uint8)
        del dropped
        memory.enter(Moment("backward"))
        gone = torch.empty(11, dtype=torch.uint8)
        view = gone[1:]
        del gone
        most = torch.empty(1000, dtype=torch.uint8)
        del most, view, saved
        memory.enter(Moment("after"))
        torch.empty(500, dtype=torch.uint8)
    peak = memory.peak()
    assert (peak.moment, peak.module, peak.total) == ("backward", "layer", 100 + 40 + 11 + 1000)
    assert peak.by_kind[Kind.WEIGHTS] == 100
    assert peak.by_kind[Kind.ACTIVATIONS] == memory.most_saved() == 40
    assert peak.by_kind[Kind.TEMPORARIES] == 1011


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain_4k", "extend_32k", "extend_128k"])
def test_a_node_of_eight_has_room_for_v3_16b(stage: str) -> None:
    request = asked("recipe=v3_16b", "--stage", stage)
    assert request.world_size == request.config.cluster.num_devices == 8
    assert run_rank(request, 0).peak.total < 1e9 * (request.config.cluster.usable_gb or 0)


PLACES = {"ep": 1, "ep_inter": 1, "ep_intra": 2}
TWO_HOP = ParallelConfig(ep=16, dispatcher=Dispatcher.two_hop, node_size=4)


def test_even_routing_sends_what_it_receives() -> None:
    model = small(num_experts=32, top_k=4, num_groups=4, top_k_groups=2)
    (inter, intra) = hops(model, TWO_HOP, tokens=1000)
    counts = EvenRouting(model, TWO_HOP, tokens=1000, places=PLACES)(torch.empty(4 + 4 + 4 + 4 + 2))
    assert sum(counts[0:4]) == sum(counts[4:8]) == round(inter.rows)
    assert sum(counts[8:12]) == sum(counts[12:16]) == round(intra.rows)
    assert sum(counts[16:]) == 4000
    assert 1000 < inter.rows <= 2000 <= intra.rows < 4000
    with pytest.raises(ValueError, match="5 counts were asked for, not 18"):
        EvenRouting(model, TWO_HOP, tokens=1000, places=PLACES)(torch.empty(5))


def test_an_imbalance_loads_this_process_more() -> None:
    model = small(num_experts=32, top_k=4, num_groups=4, top_k_groups=2)
    plain = ParallelConfig(ep=4)
    counts = EvenRouting(model, plain, tokens=1000, places=PLACES, imbalance=2.0)(torch.empty(4 + 4 + 8))
    assert sum(counts[:4]) == 4000
    assert counts[1] == 2000
    assert counts[4:8] == [2000] * 4
    assert sum(counts[8:]) == 8000
    with pytest.raises(ValueError, match="use at most 4"):
        EvenRouting(model, plain, tokens=1000, places=PLACES, imbalance=5.0)


@pytest.mark.parametrize("schedule", Schedule)
def test_fewer_microbatches_hold_as_much_at_once(schedule: Schedule) -> None:
    parallel = ParallelConfig(pp=4, schedule=schedule)
    fewer = enough_microbatches(parallel, 40)
    assert fewer == 40 if schedule is Schedule.gpipe else 4 <= fewer < 20
    sizes = {"pp": 4, "chunks": 2}
    whole = held_at_once(schedule, **sizes, num_microbatches=40)
    assert held_at_once(schedule, **sizes, num_microbatches=fewer) == whole


V3 = ("recipe=deepseek_v3", "--microbatches", "1", "--rank", "1024")
"""The ninth pipeline rank: four layers of experts."""


def collected(report: RankReport, *groups: str) -> float:
    """Return the bytes of one microbatch's all-to-alls on these groups."""
    found = [each for each in report.collectives if each.group in groups and each.operation == "all_to_all"]
    return sum(each.num_bytes for each in found) / report.microbatches_of_step


@pytest.mark.parametrize("changes", [(), ("parallel.dispatcher=alltoall", "precision=fp8_triton")])
def test_a_rank_of_deepseek_v3_computes_and_sends_what_closed_forms_say(changes: tuple[str, ...]) -> None:
    request = asked(*V3, "parallel.recompute=none", *changes)
    report = run_rank(request, 1024)
    assert report.layers == ("15-16", "45-46")
    model = request.config.model
    flops = sum(layer_flops_per_token(model, layer, 4096) for layer in (15, 16, 45, 46))
    assert report.flops_per_microbatch == pytest.approx(4096 * flops, rel=0.01)
    row = row_bytes_of(model, request.config.precision)
    expected = exchanged_bytes(model, request.parallel, tokens=4096, row=row)
    for group, num_bytes in expected.items():
        assert collected(report, group) == pytest.approx(4 * num_bytes, rel=0.01)
    assert expected.keys() == ({"ep"} if changes else {"ep_inter", "ep_intra"})


@pytest.mark.parametrize("pipeline", [(), ("parallel.pp=2", "parallel.schedule=dualpipev")])
def test_full_recomputation_runs_and_dispatches_twice(pipeline: tuple[str, ...]) -> None:
    layout = ("parallel.ep=2", "parallel.microbatch_size=1", "parallel.recompute=full", *pipeline)
    request = asked("recipe=smoke", "--world-size", "4" if pipeline else "2", "--rank", "0", *layout)
    reports = [run_rank(request, rank) for rank in ((0, 2) if pipeline else (0,))]
    model = request.config.model
    row = row_bytes_of(model, request.config.precision)
    expected = exchanged_bytes(model, request.parallel, tokens=128, row=row)
    collected_by_all = sum(collected(report, "ep") for report in reports)
    assert collected_by_all == pytest.approx(4 * expected["ep"], rel=1e-9)  # three layers and MTP
    once = 128 * flops_per_token(model, 128)
    assert 1.15 * once < sum(report.flops_per_microbatch for report in reports) < 1.4 * once


def test_one_rank_of_each_kind_holds_the_whole_model() -> None:
    request = asked("recipe=smoke", "parallel=pp2_ep2", "--world-size", "4", "model.num_layers=5")
    kinds = kinds_of_ranks(request)
    assert [(kind.rank, kind.pp_ranks) for kind in kinds] == [(0, (0,)), (2, (1,))]
    said: list[int] = []
    reports = run_everyone(request, kinds, workers=1, done=lambda report: said.append(report.rank))
    assert said == [0, 2]
    assert total_parameters(kinds, reports) == num_parameters(request.config.model)


def test_pipeline_ranks_that_are_alike_are_run_once() -> None:
    layout = ("parallel.pp=4", "parallel.schedule=gpipe", "parallel.layers_per_stage=[2,3,3,1]")
    request = asked("recipe=smoke", "--world-size", "4", "model.num_layers=9", *layout)
    assert [kind.pp_ranks for kind in kinds_of_ranks(request)] == [(0,), (1, 2), (3,)]


def test_advice_is_legal_and_would_help() -> None:
    job = ("recipe=smoke", "cluster=h100", "cluster.memory_reserve_gb=0", "cluster.memory_gb=0.095")
    request = asked(*job)
    report = run_rank(request, 0)
    assert report.peak.total > 0.095e9
    advice = advise(request, [report])
    assert 1 <= len(advice) <= 3
    assert [each.slowdown for each in advice] == sorted(each.slowdown for each in advice)
    helped = run_rank(asked(*job, *advice[0].overrides), 0)
    assert helped.peak.total == advice[0].num_bytes <= 0.095e9


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe=smoke", "cluster=h800", "--json", "--rank", "all", "--workers", "1"])
    values = json.loads(capsys.readouterr().out)
    (rank,) = values["ranks"]
    assert values["fits"] is True
    assert values["memory_limit_bytes"] == 74e9
    assert rank["peak"]["total"] == sum(rank["peak"]["by_kind"].values())
    assert values["total_parameters"] == rank["parameters"]
    assert rank["flops_per_step"] == rank["flops_per_microbatch"] * values["microbatches_of_step"]


def test_the_command_prints_tables_that_fit_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("parallel=pp2_ep2", "--world-size", "4", "parallel.microbatch_size=1")
    main(["recipe=smoke", "cluster=h800", "cluster.memory_gb=6.01", *layout, "--workers", "1"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for word in ("embed 0", "MTP", "0B0", "all_to_all", "reduce_scatter", "per microbatch", "does not fit"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "nowhere"], "--stage=nowhere is no stage of recipe=smoke; use pretrain_4k"),
        (["parallel.engine=deepspeed"], "use engine=zero1, or python -m launch plan"),
        (["precision=fp8_te"], "precision.gemm=fp8_te: Transformer Engine needs an accelerator"),
        (["optimizer.kernel=transformer_engine"], "use optimizer.kernel=torch, whose state is the same"),
        (["--rank", "1"], "--rank=1 must lie in [0, 1)"),
        (["--world-size", "3", "parallel.pp=2"], "parallel.pp=2 needs a multiple of 2 processes"),
    ],
)
def test_what_cannot_be_run_dry_is_refused_in_words(arguments: list[str], words: str) -> None:
    with pytest.raises(RunError) as error:
        asked("recipe=smoke", *arguments)
    assert words in str(error.value)
    assert error.value.exit_code == 2


def test_an_impossible_imbalance_is_refused() -> None:
    with pytest.raises(RunError, match=r"--imbalance: imbalance=9 .* use at most 4"):
        main(["recipe=smoke", "--imbalance", "9", "--workers", "1"])
