"""What FP8 loses, over processes and in a run's records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig, Recompute
from model.fp8_watch import Fp8Watch
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tests.train.fake_run import FakeStage, write_fake_run
from tests.train.report_reader import Page, known
from tests.train.tiny_job import metrics, train
from train.build import build_stage
from train.fp8_numerics import Fp8Numerics, measured
from train.parity.layouts import parse
from train.parity.task import CPU, Task, run_config, take_step, token_rows
from train.report import write_report
from train.reporting.fp8 import fp8_panels
from train.reporting.run_data import read_run
from train.reporting.timeline import Timeline

TASK = Task(
    precision=PrecisionConfig(
        compute=Compute.fp32,
        gemm=Gemm.fp8_reference,
        fp8_scales=Fp8Scales.power_of_two,
        fp8_dispatch=False,
    ),
    seq_len=8,
    steps=1,
    seed=1010,
)
"""The FP8 task of the parity matrix, whose tokens lie near no rounding boundary."""


def numerics(rank: int, layout: Layout, parallel: ParallelConfig, task: Task = TASK) -> Fp8Numerics | None:
    mesh = build_mesh(layout, rank=rank)
    config = run_config(parallel, task)
    parts = build_stage(config, config.stages["parity"], device=CPU, mesh=mesh)
    parts.watch.start(active=True)
    take_step(parts, config, token_rows(task, 0))
    return measured(parts.watch, mesh.world, CPU)


def of_layout(name: str, task: Task = TASK, **changes: Any) -> list[Fp8Numerics]:
    named = parse(name)
    parallel = replace(named.parallel, **changes)
    if named.world_size == 1:
        return [numerics(0, named.layout, parallel, task) or {}]
    return run_ranks(named.world_size, numerics, named.layout, parallel, task)


def test_layouts_count_what_one_process_counts() -> None:
    """Pipelines, copies and experts that are spread; each recomputes in a way of its own."""
    (expected,) = of_layout("dp1")
    assert expected.keys() == {"weights", "activations", "expert_rows", "gradients"}
    assert expected["gradients"]["underflow"] > 0
    layouts = {
        "dp2_replicate2": Recompute.core,
        "ep2": Recompute.deepseek,
        "pp2_zbv": Recompute.full,
        "pp2_dualpipev_ep2": Recompute.full,
    }
    for name, recompute in layouts.items():
        assert all(found == expected for found in of_layout(name, recompute=recompute)), name


def test_what_travels_as_codes_counts_as_on_one_process() -> None:
    """In one hop and in two, in a pipeline, and whatever is recomputed; experts see only decoded rows."""
    coded = replace(TASK, precision=replace(TASK.precision, fp8_dispatch=True))
    (expected,) = of_layout("dp1", coded)
    assert expected["expert_rows"]["saturated"] > 0
    assert expected["gradients"]["underflow"] > 0
    layouts = {
        "ep2": Recompute.deepseek,
        "ep4_twohop2": Recompute.none,
        "pp2_dualpipev_ep2": Recompute.full,
    }
    for name, recompute in layouts.items():
        assert all(found == expected for found in of_layout(name, coded, recompute=recompute)), name


def test_a_watch_that_is_not_active_yields_nothing_and_costs_no_exchange() -> None:
    named = parse("dp1")
    mesh = build_mesh(named.layout, rank=0)
    calls: list[str] = []
    mesh.trace.listeners.append(lambda call: calls.append(call.operation))
    assert measured(Fp8Watch(), mesh.world, CPU) is None
    assert calls == []


OVERRIDES = ("precision.gemm=fp8_reference", "logging.fp8_every=4", "stages.pretrain_4k.num_tokens=256")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("fp8"), *OVERRIDES)


def test_a_run_records_the_steps_that_are_due(run_dir: Path) -> None:
    records = metrics(run_dir)
    measured_steps = [record["step"] for record in records if "fp8" in record]
    assert len(records) >= 8
    assert measured_steps == [record["step"] for record in records if record["step"] % 4 == 0]
    for values in (record["fp8"] for record in records if "fp8" in record):
        assert values.keys() == {"weights", "activations", "expert_rows", "gradients"}
        for shares in values.values():
            assert shares["amax"] > 0
            assert 0 <= shares["underflow"] < 0.1
            assert 0 < shares["saturated"] < 0.2


def test_counting_changes_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    uncounted = metrics(train(tmp_path, *OVERRIDES, "logging.fp8_every=1000"))
    assert not any("fp8" in record for record in uncounted)
    assert [without_fp8(record) for record in metrics(run_dir)] == uncounted


def without_fp8(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "fp8"}


def test_charts_and_the_report_have_the_curves(run_dir: Path) -> None:
    from train.logs.wandb_sink import scalars

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"fp8"' in line][-1]
    assert scalars(last)["fp8/gradients/underflow"] == last["fp8"]["gradients"]["underflow"]
    page = Page(write_report(run_dir))
    assert {"FP8 underflow", "FP8 at the largest code", "FP8 magnitudes"} <= set(page.titles)
    curves = {trace["name"]: trace for trace in page.figure("FP8 magnitudes")["data"]}
    assert known(curves["gradients"]["y"])[-1] == last["fp8"]["gradients"]["amax"]


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        (PrecisionConfig(), "the run multiplied in bf16"),
        (PrecisionConfig(gemm=Gemm.fp8_te), "Transformer Engine quantises inside"),
        (PrecisionConfig(gemm=Gemm.fp8_reference), "every 10th is (logging.fp8_every)"),
    ],
)
def test_a_report_without_counts_says_why(precision: PrecisionConfig, words: str, tmp_path: Path) -> None:
    run = read_run(write_fake_run(tmp_path / "run", [FakeStage("pretrain", 128, 32, 9)]))
    run = replace(run, config=replace(run.config, precision=precision))
    (panel,) = fp8_panels(run, Timeline(run))
    assert panel.figure is None
    assert words in panel.missing
