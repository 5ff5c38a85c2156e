"""Every layout of the default matrix repeats one process, gradient by gradient."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import Compute, Gemm
from parallel.config import ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from train.engines.choose import deepspeed_engine
from train.parity.command import as_json, table
from train.parity.compare import TOLERANCE, Row, compare
from train.parity.layouts import DEFAULT, parse
from train.parity.matrix import run_layout
from train.parity.task import CPU, STEPS, Record, run_task


@pytest.fixture(scope="module")
def reference() -> Record:
    deepspeed_engine(CPU)  # once here, rather than in every process that is forked
    return run_task(0, Layout(), ParallelConfig())


def test_the_task_has_what_goes_wrong(reference: Record) -> None:
    """Uneven loads, biases that move, clipping that acts, all losses, and no gradient of zero."""
    assert len(reference.steps) == STEPS == 2
    for step in reference.steps:
        assert len(step.loss_K) == 2
        assert step.balance_loss > 0
        assert step.grad_norm > 0.5
        assert step.load_LE.float().std(1).min() > 1
        for name, ((_, gradient),) in step.gradients.items():
            assert gradient.abs().max() > 0, name
    assert all(bias.abs().max() > 0 for bias in reference.biases.values())


@pytest.mark.parametrize("name", DEFAULT)
def test_a_layout_repeats_one_process(name: str, reference: Record) -> None:
    row = compare(name, run_layout(parse(name)), reference)
    assert row.passed, row
    # routing is discrete: as long as no choice flips, counts and biases are equal to the last bit
    assert row.load
    assert row.bias == 0


def test_one_process_is_itself(reference: Record, tmp_path: Path) -> None:
    row = compare("dp1", [run_task(0, Layout(), ParallelConfig())], reference)
    assert row.gradient.distance == row.parameter.distance == row.grad_norm == 0
    written = json.loads(json.dumps(as_json([row])))
    assert written["passed"] is True
    assert written["rows"][0]["layout"] == "dp1"
    assert table([row]).row_count == 1


def first_step(name: str, compute: Compute, gemm: Gemm) -> Row:
    """Compare one step of a layout with one process that computes in the same types.

    One step: afterwards a weight may round to another value.
    """
    layout = parse(name)
    expected = run_task(0, Layout(), ParallelConfig(), compute, gemm)
    records = run_ranks(layout.world_size, run_task, layout.layout, layout.parallel, compute, gemm)
    first = [replace(record, steps=record.steps[:1]) for record in records]
    return compare(name, first, replace(expected, steps=expected.steps[:1]))


@pytest.mark.parametrize("gemm", [Gemm.compute, Gemm.fp8_reference])
@pytest.mark.parametrize("name", ["dp4_replicate2", "pp2_1f1b", "pp2_dualpipev", "pp2_zbv_dp2"])
def test_low_precision_gradients_are_summed_in_fp32(name: str, gemm: Gemm) -> None:
    """These layouts leave each microbatch's own arithmetic alone, so BF16 and FP8 have no excuse.

    Only the order of FP32 sums differs. A sum in BF16 would be off by 2^-9. (Layouts that split a sequence, a
    weight or the rows of an expert quantise other tiles together.)
    """
    row = first_step(name, Compute.bf16, gemm)
    assert row.load
    assert max(row.loss, row.balance_loss, row.grad_norm, row.gradient.distance) < TOLERANCE, row
