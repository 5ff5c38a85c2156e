"""Each backend in the place where training puts it: optimizer steps, schedules, codes that are forgotten."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig
from parallel.config import ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.model.kernels.triton.conftest import set_interpreter
from tests.model.te_stand_in import install_stand_in
from train.build import build_stage
from train.parity.compare import TOLERANCE, compare
from train.parity.layouts import parse
from train.parity.task import CPU, PLAIN, Record, Task, run_config, run_task
from train.precision import Fp8Schedule

MICROBATCH = 16


def task(gemm: Gemm) -> Task:
    precision = PrecisionConfig(
        compute=Compute.fp32, gemm=gemm, fp8_scales=Fp8Scales.power_of_two, fp8_dispatch=False
    )
    return replace(PLAIN, precision=precision)


@pytest.fixture(scope="module")
def plain() -> Record:
    return run_task(0, Layout(), ParallelConfig())


@pytest.mark.parametrize("name", ["dp2", "pp2_zbv", "pp2_dualpipev", "tp2", "ep2"])
def test_transformer_engine_in_a_layout(monkeypatch: pytest.MonkeyPatch, name: str, plain: Record) -> None:
    """With plain products in the place of its own: two steps are those of one process without it.

    Gradients arrive in the flat buffers, schedules put products off, codes are made anew for the second step.
    """
    install_stand_in(monkeypatch, width_multiple=1)
    layout = parse(name)
    records = run_ranks(layout.world_size, run_task, layout.layout, layout.parallel, task(Gemm.fp8_te))
    row = compare(name, records, plain)
    assert row.load
    assert max(row.loss, row.balance_loss, row.grad_norm, row.gradient.distance) < TOLERANCE, row


def test_who_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, width_multiple=1)
    for gemm in (Gemm.compute, Gemm.fp8_reference, Gemm.fp8_te):
        config = run_config(ParallelConfig(), task(gemm))
        parts = build_stage(config, config.stages["parity"], device=CPU, mesh=build_mesh(Layout(), rank=0))
        assert isinstance(parts.schedule, Fp8Schedule) == (gemm is not Gemm.compute)


@pytest.mark.slow
def test_triton_trains_as_the_reference_does() -> None:
    """Two steps in the interpreter, of a process in which Triton was told so before its import."""
    layout = ParallelConfig(microbatch_size=MICROBATCH)
    reference, triton = (replace(task(gemm), seq_len=8) for gemm in (Gemm.fp8_reference, Gemm.fp8_triton))
    expected = run_task(0, Layout(), layout, reference)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_interpreter) as pool:
        record = pool.submit(run_task, 0, Layout(), layout, triton).result()
    row = compare("dp1", [record], expected)
    assert row.load
    assert max(row.loss, row.balance_loss, row.grad_norm) < TOLERANCE, row
    assert row.gradient.distance < 2e-3, row  # a rounding may move a value to the next code
