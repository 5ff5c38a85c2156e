"""Every layout of the default matrix repeats one process, gradient by gradient."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import Compute, Gemm, PrecisionConfig
from model.fp8 import Fp8Policy, install_fp8
from model.linear import Linear
from model.weight_gradients import WeightGradients
from parallel.config import ParallelConfig
from parallel.forked import run_ranks
from parallel.layout import Layout
from train.build import StageParts, build_stage
from train.engines.choose import deepspeed_engine
from train.parity.command import as_json, table
from train.parity.compare import TOLERANCE, Row, compare
from train.parity.layouts import DEFAULT, parse
from train.parity.matrix import run_layout, tolerance
from train.parity.task import CPU, FP8, PLAIN, Record, run_task


@pytest.fixture(scope="module")
def reference() -> Record:
    deepspeed_engine(CPU)  # once here, rather than in every process that is forked
    return run_task(0, Layout(), ParallelConfig())


def test_the_task_has_what_goes_wrong(reference: Record) -> None:
    """Uneven loads, biases that move, clipping that acts, all losses, and no gradient of zero."""
    assert len(reference.steps) == PLAIN.steps == 2
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
    assert table([row], PLAIN).row_count == 1


def first_step(name: str, compute: Compute, gemm: Gemm) -> Row:
    """Compare one step of a layout with one process that computes in the same types.

    One step: afterwards a weight may round to another value.
    """
    layout = parse(name)
    task = replace(PLAIN, precision=PrecisionConfig(compute=compute, gemm=gemm), steps=1)
    expected = run_task(0, Layout(), ParallelConfig(), task)
    return compare(
        name, run_ranks(layout.world_size, run_task, layout.layout, layout.parallel, task), expected
    )


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


@pytest.fixture(scope="module")
def fp8_reference() -> Record:
    return run_task(0, Layout(), ParallelConfig(), FP8)


FP8_LAYOUTS = (
    "dp4_replicate2",
    "dp2_deepspeed2",
    "dp2_deepspeed3",
    "tp4",
    "ep4",
    "ep4_twohop2",
    "cp2",
    "cp2_ulysses",
    "pp4_zbv",
    "pp2_tp2_ep2_dp2",
    "pp2_dualpipev_cp2_ep2",
    "pp2_dualpipev_dp2_cp2_ep4",
)
"""One of each kind; `python -m train.parity --gemm fp8_reference` proves all."""


@pytest.mark.parametrize("name", FP8_LAYOUTS)
def test_a_layout_repeats_one_process_in_fp8(name: str, fp8_reference: Record) -> None:
    layout = parse(name)
    row = replace(compare(name, run_layout(layout, FP8), fp8_reference), tolerance=tolerance(layout, FP8))
    assert row.passed, row


def test_cp_differs_in_fp8_only_by_what_multiplies_gathered_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide tolerance of cp has one cause: without FP8 on the way to keys and values, cp is like all."""

    def without_latents(part: nn.Module, policy: Fp8Policy, later: WeightGradients) -> None:
        install_fp8(part, policy, later)
        for name, module in part.named_modules():
            if isinstance(module, Linear) and name.endswith(("attn.wkv_a", "attn.wkv_b")):
                module.gemm = F.linear

    monkeypatch.setattr("train.precision.install_fp8", without_latents)
    expected = run_task(0, Layout(), ParallelConfig(), FP8)
    for name in ("cp2", "pp2_cp2_ep2"):
        row = compare(name, run_layout(parse(name), FP8), expected)
        assert row.passed, row


@pytest.mark.parametrize("seed", range(3))
def test_nothing_in_the_fp8_task_lies_at_a_rounding_boundary(seed: int, fp8_reference: Record) -> None:
    """Noise of the size of an FP32 rounding error must not move a code: layouts sum in other orders."""
    generator = torch.Generator().manual_seed(seed)

    def disturbed(*arguments: Any, **keywords: Any) -> StageParts:
        parts = build_stage(*arguments, **keywords)
        embedding = parts.model.named_parameters()["embed.weight"]
        with torch.no_grad():
            embedding *= 1 + 1e-7 * torch.randn(embedding.shape, generator=generator)
        return parts

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("train.parity.task.build_stage", disturbed)
        noisy = run_task(0, Layout(), ParallelConfig(), FP8)
    row = compare("noisy", [noisy], fp8_reference)
    assert row.gradient.distance < TOLERANCE, row
