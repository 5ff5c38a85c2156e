"""`precision.fp8_dispatch` decides whether tokens travel to FP8 experts as codes, and nothing else."""

from dataclasses import replace

import pytest
from torch import Tensor

from model.config import Compute, Gemm, PrecisionConfig
from model.moe import MoE
from parallel.config import ParallelConfig
from parallel.expert import AllToAllDispatcher
from parallel.groups import CollectiveCall
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.wire import Fp8Wire, NumberWire
from tests.distributed import run_ranks
from tests.golden.compose import compose_run
from train.build import build_stage
from train.parity.task import CPU, FP8, StepRecord, Task, run_config, take_step, token_rows


def step(rank: int, task: Task, *, coded: bool) -> tuple[StepRecord, int]:
    """Take one step over two processes that share the experts; return it and the bytes sent to experts."""
    mesh = build_mesh(Layout(dp_shard=2, ep=2), rank=rank)
    config = run_config(ParallelConfig(dp=2, ep=2), task)
    parts = build_stage(config, config.stages["parity"], device=CPU, mesh=mesh)
    dispatchers = [
        m.dispatcher for part in parts.model.parts.values() for m in part.modules() if isinstance(m, MoE)
    ]
    assert dispatchers
    for dispatcher in dispatchers:
        assert isinstance(dispatcher, AllToAllDispatcher)
        assert isinstance(dispatcher.wire, Fp8Wire if coded else NumberWire)
    calls: list[CollectiveCall] = []
    mesh.world.trace.listeners.append(calls.append)
    record = take_step(parts, config, token_rows(task, 0))
    return record, sum(call.num_bytes for call in calls if call.operation == "all_to_all")


def compare(rank: int) -> None:
    numbers = replace(FP8, precision=replace(FP8.precision, fp8_dispatch=False))
    (expected, number_bytes), (ours, coded_bytes) = (
        step(rank, task, coded=coded) for task, coded in ((numbers, False), (FP8, True))
    )
    assert coded_bytes < 0.75 * number_bytes
    assert (ours.loss_K, ours.grad_norm) == (expected.loss_K, expected.grad_norm)
    for name, boxes in expected.gradients.items():
        assert all(same(a, b) for a, b in zip(boxes, ours.gradients[name], strict=True)), name


def same(ours: tuple[tuple[int, ...], Tensor], theirs: tuple[tuple[int, ...], Tensor]) -> bool:
    return ours[0] == theirs[0] and ours[1].equal(theirs[1])


def test_a_step_over_two_processes() -> None:
    run_ranks(2, compare)


@pytest.mark.parametrize("gemm", Gemm)
def test_only_fp8_experts_are_sent_codes(gemm: Gemm) -> None:
    precision = PrecisionConfig(compute=Compute.bf16, gemm=gemm)
    assert precision.exchanges_codes == (gemm is not Gemm.compute)
    assert not replace(precision, fp8_dispatch=False).exchanges_codes


def test_the_switch_on_the_command_line() -> None:
    assert compose_run("recipe=smoke", "precision=fp8_reference").precision.exchanges_codes
    off = compose_run("recipe=smoke", "precision=fp8_reference", "precision.fp8_dispatch=false")
    assert not off.precision.exchanges_codes
