"""The deepspeed engine against the default one, on the same model, data and rules."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import Compute, Recompute
from parallel.config import Engine, ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.pieces import Holding, Pieces
from tests.distributed import run_ranks
from tests.train.engines.runs import (
    DP2,
    STAGES,
    ZERO1,
    build,
    config_of,
    distance,
    equal,
    everything,
    next_step,
    offloaded,
    passes,
    update,
    whole,
)
from train.build import StageParts
from train.checkpoints.storage import load_tensors, save_tensors
from train.config import Moments, RunConfig

ROOT = Path(__file__).resolve().parents[3]


def two_steps(
    mesh: Mesh, config: RunConfig
) -> tuple[list[dict[str, Tensor]], list[float], dict[str, Tensor]]:
    parts = build(mesh, config)
    gradients, norms = [], []
    for step in range(2):
        passes(parts, step)
        gradients.append(whole(parts.engine.gradients()))
        norms.append(update(parts)[0])
    assert parts.engine.num_updates == 2
    return gradients, norms, everything(parts)


def against_zero1(
    rank: int, layout: Layout, first: ParallelConfig, others: list[ParallelConfig]
) -> list[str]:
    mesh = build_mesh(layout, rank=rank)
    wrong = []
    for compute in (Compute.fp32, Compute.bf16):
        gradients, norms, state = two_steps(mesh, config_of(first, compute))
        for parallel in others:
            mine = two_steps(mesh, config_of(parallel, compute))
            found = {
                "gradients": max(map(distance, mine[0], gradients)),
                "norm": max(abs(a - b) / b for a, b in zip(mine[1], norms, strict=True)),
                "state": distance(mine[2], state),
            }
            wrong += [f"{compute} {parallel} {k}: {v:.1e}" for k, v in found.items() if not v <= 5e-6]
    return wrong


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_gradient_and_all_state_equal_the_default_engines(stage: int) -> None:
    """In FP32, and in BF16, where only FP32 accumulation and FP32 sums over processes can agree so well."""
    layouts = [STAGES[stage], offloaded(STAGES[stage])]
    assert run_ranks(2, against_zero1, DP2, ZERO1, layouts) == [[], []]


def test_a_pipeline_rank_without_fp32_parameters() -> None:
    """The first stage is the embedding alone; the last one has a copy, for MTP."""
    first = replace(ZERO1, dp=1, pp=2, layers_per_stage=[0, 2])
    second = replace(first, engine=Engine.deepspeed)
    assert run_ranks(2, against_zero1, Layout(pp=2), first, [second, offloaded(second)]) == [[], []]


@pytest.mark.slow
def test_stages_2_and_3_with_experts_and_tensors_split() -> None:
    first = replace(ZERO1, dp=1, tp=2, ep=2)
    others = [replace(first, engine=Engine.deepspeed, zero_stage=stage) for stage in (2, 3)]
    assert run_ranks(2, against_zero1, Layout(tp=2, ep=2), first, others) == [[], []]


def alone(rank: int) -> bool:
    mesh, one = build_mesh(Layout(), rank=0), replace(ZERO1, dp=1)
    reference = two_steps(mesh, config_of(one))
    dist.destroy_process_group()  # as where a program was started without a launcher
    found = [two_steps(mesh, config_of(replace(one, engine=Engine.deepspeed, zero_stage=z))) for z in (1, 3)]
    return all(distance(mine[2], reference[2]) <= 5e-6 for mine in found)


def test_one_process() -> None:
    assert run_ranks(1, alone) == [True]


# Checkpoints


def exchange(rank: int, folder: Path, between: list[ParallelConfig], moments: Moments) -> list[str]:
    """Hand a state from zero1 through the other engines and back; return what changed on the way."""
    mesh = build_mesh(DP2, rank=rank)
    config = config_of(ZERO1, moments=moments)
    source, place = build(mesh, config), folder / "0"
    for step in range(2):
        passes(source, step)
        update(source)
    save(place, source)
    saved, expected, wrong = everything(source), next_step(source), []
    for index, parallel in enumerate([*between, ZERO1], start=1):
        parts = build(mesh, replace(config, parallel=parallel))
        load_tensors(place, parts.tensors(), group=mesh.world)
        parts.engine.use_loaded(num_updates=2)
        if not equal(everything(parts), saved):
            wrong.append(f"{parallel}: loaded state differs")
        place = folder / str(index)
        save(place, parts)
        if not distance(next_step(parts), expected) <= (5e-6 if moments is Moments.fp32 else 1e-2):
            wrong.append(f"{parallel}: the next step differs")
    return wrong


def save(place: Path, parts: StageParts) -> None:
    place.mkdir(exist_ok=True)
    save_tensors(place, parts.tensors(), group=parts.mesh.world)


@pytest.mark.parametrize("moments", [Moments.fp32, pytest.param(Moments.bf16, marks=pytest.mark.slow)])
def test_a_state_goes_through_every_stage_and_back_unchanged(moments: Moments, tmp_path: Path) -> None:
    """Bit by bit; moments of the step after it may round to the next BF16 number."""
    between = [STAGES[1], STAGES[3], offloaded(STAGES[2])]
    assert run_ranks(2, exchange, tmp_path, between, moments) == [[], []]


# Steps that are left out, loss scales, recomputation


def leave_out(rank: int, parallels: list[ParallelConfig]) -> list[str]:
    mesh = build_mesh(DP2, rank=rank)
    wrong = []
    for parallel in parallels:
        parts, untroubled = build(mesh, config_of(parallel)), build(mesh, config_of(parallel))
        for each in (parts, untroubled):
            passes(each, 0)
            update(each)
        before = everything(parts)
        for kind in ("loss", "gradient"):
            passes(parts, 1)
            if kind == "gradient" and rank == 1:
                held = next(h for h in boxes_in_place(parts.engine.gradients()) if h.numel())
                held.view(-1)[0] = torch.inf
            norm, skipped = update(parts, finite=kind == "gradient")
            if not skipped or (norm < 1e9) != (kind == "loss") or parts.engine.num_updates != 1:
                wrong.append(f"{parallel}: a step with a bad {kind} was taken")
            if not equal(everything(parts), before):
                wrong.append(f"{parallel}: a bad {kind} changed something")
        if not equal(next_step(parts), next_step(untroubled)):
            wrong.append(f"{parallel}: gradients of a step that was left out are in the next one")
    return wrong


def boxes_in_place(holdings: dict[str, Holding]) -> list[Tensor]:
    return [
        tensor
        for held in holdings.values()
        for tensor in ([piece.tensor for piece in held.pieces] if isinstance(held, Pieces) else [held])
    ]


def test_a_step_left_out_changes_nothing_and_leaves_nothing() -> None:
    several = [STAGES[1], STAGES[3], offloaded(STAGES[2])]
    assert run_ranks(2, leave_out, several) == [[], []]


def scaled(rank: int) -> list[float]:
    """Return how far a loss scale of 1024, exact in FP32, moves norm and state."""
    mesh = build_mesh(DP2, rank=rank)
    found = []
    for parallel in (STAGES[1], STAGES[3]):
        plain, large = build(mesh, config_of(parallel)), build(mesh, config_of(parallel))
        passes(plain)
        passes(large, loss_scale=1024.0)
        norms = update(plain)[0], update(large, loss_scale=1024.0)[0]
        found += [abs(norms[0] - norms[1]) / norms[0], distance(everything(large), everything(plain))]
    return found


def test_a_loss_scale_is_divided_out() -> None:
    assert max(run_ranks(2, scaled)[0]) <= 5e-6


def recomputed(rank: int) -> list[float]:
    """Return how far the gradients of each mode are from those without recomputation."""
    mesh = build_mesh(DP2, rank=rank)
    gradients = []
    for parallel in (ZERO1, *(replace(STAGES[3], recompute=r) for r in Recompute if r is not Recompute.none)):
        parts = build(mesh, config_of(parallel))
        passes(parts)
        gradients.append(whole(parts.engine.gradients()))
    return [distance(mine, gradients[0]) for mine in gradients[1:]]


@pytest.mark.slow
def test_stage_3_fetches_weights_for_recomputation() -> None:
    assert max(run_ranks(2, recomputed)[0]) <= 5e-6


def test_the_default_engine_does_not_load_deepspeed() -> None:
    code = "import sys, train.build; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
