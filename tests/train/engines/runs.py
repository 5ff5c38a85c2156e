"""Small runs of the two engines on two processes, and what they leave."""

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import Compute, PrecisionConfig
from parallel.config import Engine, Offload, ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.pieces import Holding
from parallel.schedule import Batch
from train.batch import make_batch
from train.build import StageParts, build_stage
from train.config import RunConfig
from train.parity.task import CPU, DEPTHS, MODEL, OPTIMIZER, PLAIN, Task, boxes_of, run_config, token_rows

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import train.engines.deepspeed  # noqa: F401  # here, not in every process that is started

SMALL = replace(MODEL, num_layers=2)
RULES = replace(OPTIMIZER, lr_multipliers={"*.experts.*": 0.5, "embed.*": 2.0}, max_grad_norm=0.3)
DP2 = Layout(dp_shard=2)
ZERO1 = ParallelConfig(dp=2, microbatch_size=4)
STAGES = {stage: replace(ZERO1, engine=Engine.deepspeed, zero_stage=stage) for stage in (1, 2, 3)}


def offloaded(parallel: ParallelConfig) -> ParallelConfig:
    return replace(parallel, offload=Offload.cpu)


def config_of(parallel: ParallelConfig, compute: Compute = Compute.bf16, **optimizer: Any) -> RunConfig:
    config = run_config(parallel, Task(precision=PrecisionConfig(compute=compute)))
    return replace(config, model=SMALL, optimizer=replace(RULES, **optimizer))


def build(mesh: Mesh, config: RunConfig) -> StageParts:
    return build_stage(config, config.stages["parity"], device=CPU, mesh=mesh)


def batch_of(mesh: Mesh, step: int) -> Batch:
    rows_BW = token_rows(PLAIN, step).chunk(mesh.dp.size)[mesh.dp.rank]
    return make_batch(rows_BW, num_mtp_layers=DEPTHS, device=CPU, mesh=mesh)


def passes(parts: StageParts, step: int = 0, *, loss_scale: float = 1.0) -> None:
    """Run the forward and backward passes of a step and sum its gradients."""
    parts.schedule.step(batch_of(parts.mesh, step), mtp_weight=0.3, loss_scale=loss_scale)
    parts.engine.reduce()


def update(parts: StageParts, *, loss_scale: float = 1.0, finite: bool = True) -> tuple[float, bool]:
    done = parts.engine.update(lr=2e-3, max_norm=0.3, loss_scale=loss_scale, finite=finite)
    return done.grad_norm, done.skipped


def whole(holdings: dict[str, Holding]) -> dict[str, Tensor]:
    """Return every tensor of which the processes hold pieces; NaN where nobody has any."""
    shapes = {name: tuple(held.shape) for name, held in holdings.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (shapes, boxes_of(holdings)))
    tensors: dict[str, Tensor] = {}
    for shapes, boxes in gathered:
        for name, shape in shapes.items():
            tensor = tensors.setdefault(name, torch.full(shape, torch.nan))
            for offsets, values in boxes[name]:
                place = tuple(slice(a, a + n) for a, n in zip(offsets, values.shape, strict=True))
                tensor[place] = values.float()
    return tensors


def everything(parts: StageParts) -> dict[str, Tensor]:
    """Return weights and moments; the model must compute with just these weights, rounded."""
    state = whole(parts.tensors())
    with parts.engine.whole_parameters():
        for name, parameter in parts.model.named_parameters().items():
            master = parts.model.sharding.share(name).of(state[f"model.{name}"])
            assert torch.equal(parameter, master.to(parameter.dtype)), name
    return state


def distance(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a tensor over its largest element; infinite for other names or NaN."""
    if mine.keys() != theirs.keys():
        return float("inf")
    worst = [
        float((mine[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        for name, expected in theirs.items()
    ]
    return max(w if w == w else float("inf") for w in worst)


def equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def next_step(parts: StageParts) -> dict[str, Tensor]:
    passes(parts, 2)
    update(parts)
    return everything(parts)
