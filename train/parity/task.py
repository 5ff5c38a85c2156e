"""The optimizer steps that every layout has to repeat, and what is recorded of them.

The model has everything that goes wrong in composed layouts: MTP, the sequence-wise balance loss,
node-limited routing with its bias, shared experts, uneven numbers of targets per sequence, clipping that
acts, and tokens routed unevenly.

`PLAIN` is two steps in FP32, so that what is left of a difference is the order of summation. `FP8` is one
step whose products in the blocks are FP8 and all else FP32. Its scales are powers of two: a code is then a
number rounded to four significant bits whatever else shares its tile, so layouts that quantise other tiles
together still compute the same. The order of summation may push a number over a rounding boundary, one of a
million codes or so, and a layer later thousands have followed; hence few tokens, one step, and a seed at
which nothing lies that near to a boundary.

Legend: B sequences of the global batch, W = S + 1 + MTP depths tokens of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import AttentionConfig, Compute, Fp8Scales, Gemm, ModelConfig, MoEConfig, PrecisionConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.pieces import Holding, Piece, Pieces
from train.balance import update_router_biases
from train.batch import IGNORED_LABEL, make_batch
from train.build import StageParts, build_stage
from train.config import Moments, OptimizerConfig, RunConfig, StageConfig

SEQUENCES, DEPTHS = 16, 1
CPU = torch.device("cpu")

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=8,
    num_dense_layers=1,
    dense_intermediate_size=48,
    attention=AttentionConfig(
        num_heads=4,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    moe=MoEConfig(
        num_experts=8,
        num_shared_experts=1,
        top_k=2,
        intermediate_size=16,
        num_groups=4,
        top_k_groups=2,
        balance_loss_weight=0.05,
    ),
    num_mtp_layers=DEPTHS,
    init_std=0.1,
)

OPTIMIZER = OptimizerConfig(
    # moments of tiny gradients are divided by themselves: with the usual eps their noise would be the update
    eps=1e-5,
    moments=Moments.fp32,
    max_grad_norm=0.5,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Steps to take: in which precision, on sequences of which length, on which tokens."""

    precision: PrecisionConfig
    seq_len: int = 32
    steps: int = 2
    seed: int = 100


PLAIN = Task(precision=PrecisionConfig(compute=Compute.fp32))
FP8 = Task(
    precision=PrecisionConfig(
        compute=Compute.fp32, gemm=Gemm.fp8_reference, fp8_scales=Fp8Scales.power_of_two
    ),
    seq_len=8,
    steps=1,
    seed=1010,
)

Boxes = dict[str, list[tuple[tuple[int, ...], Tensor]]]
"""By tensor, the boxes that a process holds of it: offsets in the whole tensor, values."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one process can say of one step. Gradients are those it owns, before clipping."""

    loss_K: list[float]
    balance_loss: float
    grad_norm: float
    load_LE: Tensor
    gradients: Boxes


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one process can say of all steps; parameters are those it computes with."""

    steps: list[StepRecord]
    parameters: Boxes
    biases: dict[str, Tensor]


def run_config(parallel: ParallelConfig, task: Task) -> RunConfig:
    """Return the configuration of a task under a layout."""
    return RunConfig(
        seed=3,
        device="cpu",
        model=MODEL,
        precision=task.precision,
        parallel=parallel,
        optimizer=OPTIMIZER,
        stages={"parity": StageConfig(seq_len=task.seq_len, num_tokens=1)},
    )


def token_rows(task: Task, step: int) -> Tensor:
    """Return the rows of the global batch [B, W], the later ones with ever fewer targets."""
    generator = torch.Generator().manual_seed(task.seed + step)
    # squared, so that some tokens are frequent and the experts unevenly loaded
    uniform_BW = torch.rand(SEQUENCES, task.seq_len + 1 + DEPTHS, generator=generator)
    rows_BW = (uniform_BW.square() * MODEL.vocab_size).long()
    for row in range(SEQUENCES):
        rows_BW[row, max(2, task.seq_len + 2 - row) :] = IGNORED_LABEL
    return rows_BW


def run_task(rank: int, layout: Layout, parallel: ParallelConfig, task: Task = PLAIN) -> Record:
    """Take the steps as process `rank` of a layout; all its processes call this together."""
    mesh = build_mesh(layout, rank=rank)
    config = run_config(parallel, task)
    parts = build_stage(config, config.stages["parity"], device=CPU, mesh=mesh)
    steps = [take_step(parts, config, token_rows(task, step)) for step in range(task.steps)]
    with parts.engine.whole_parameters():
        parameters = {
            name: _boxes_of_whole_share(parts, name, parameter.detach())
            for name, parameter in parts.model.named_parameters().items()
        }
    biases = {name: router.bias.clone() for name, router in parts.model.routers().items()}
    return Record(steps=steps, parameters=parameters, biases=biases)


def take_step(parts: StageParts, config: RunConfig, all_rows_BW: Tensor) -> StepRecord:
    """Take one optimizer step on this process's share of the global batch [B, W]."""
    mesh: Mesh = parts.mesh
    rows_BW = all_rows_BW.chunk(mesh.dp.size)[mesh.dp.rank]
    batch = make_batch(rows_BW, num_mtp_layers=DEPTHS, device=CPU, mesh=mesh)
    output = parts.schedule.step(batch, mtp_weight=0.3)
    parts.engine.reduce()
    gradients = boxes_of(parts.engine.gradients())
    update = parts.engine.update(
        lr=2e-3, max_norm=config.optimizer.max_grad_norm, loss_scale=1.0, finite=True
    )
    update_router_biases(parts.model.routers(), output.loads_of(parts.model.routers()), speed=0.01)
    return StepRecord(
        loss_K=output.mean_loss_K.tolist(),
        balance_loss=float(output.balance_loss),
        grad_norm=update.grad_norm,
        load_LE=output.load_LE,
        gradients=gradients,
    )


def boxes_of(holdings: Mapping[str, Holding]) -> Boxes:
    """Return what is held of each tensor as boxes, copied."""
    return {
        name: [(piece.offsets, piece.tensor.clone()) for piece in _pieces(holding)]
        for name, holding in holdings.items()
    }


def _pieces(holding: Holding) -> tuple[Piece, ...]:
    if isinstance(holding, Pieces):
        return holding.pieces
    return (Piece((0,) * holding.dim(), holding),)


def _boxes_of_whole_share(
    parts: StageParts, name: str, parameter: Tensor
) -> list[tuple[tuple[int, ...], Tensor]]:
    share = parts.model.sharding.share(name)
    origin = [0] * parameter.dim()
    origin[share.dim] = share.index * parameter.shape[share.dim]
    return [(tuple(origin), parameter.clone())]
