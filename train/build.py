"""From a configuration to the objects that train one stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor

from model.config import Compute
from model.fp8_watch import Fp8Watch
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from parallel.config import Schedule as PipelineName
from parallel.mesh import Mesh
from parallel.model import ParallelModel, build_model
from parallel.pieces import Holding
from parallel.pipeline.executor import PipelineSchedule
from parallel.pipeline.table import ActionTable
from parallel.schedule import LocalSchedule, LossFunction, Schedule, WorldSchedule
from parallel.tensor import TensorSplit, VocabularyRows
from train.config import RunConfig, StageConfig
from train.ema import Ema
from train.engines.choose import build_engine
from train.engines.engine import Engine
from train.errors import RunError
from train.fp8_numerics import watch_of
from train.loss import Objective
from train.loss_scale import LossScale
from train.precision import Fp8Schedule, install_backend


@dataclass(frozen=True, kw_only=True)
class StageParts:
    """Everything that trains one stage. A checkpoint is written from `tensors()` and restored into them."""

    mesh: Mesh
    model: ParallelModel
    engine: Engine
    schedule: Schedule
    loss_scale: LossScale
    ema: Ema | None
    watch: Fp8Watch

    def weights(self) -> dict[str, Holding]:
        """Return FP32 master weights and router biases by checkpoint name."""
        return _named("model.{}", self.engine.weights()) | self._biases()

    def tensors(self) -> dict[str, Holding]:
        """Return every tensor of a checkpoint by name."""
        average = self.engine.stored_like_masters(self.ema.averages()) if self.ema else {}
        return self.weights() | _named("optim.{}", self.engine.moments()) | _named("ema.{}", average)

    def all_biases(self, layers: Sequence[str]) -> Tensor:
        """Return the router biases of layers of the whole model, FP32 [L, E].

        All processes call this together; one of each pipeline rank contributes, its peers hold the same.
        """
        place, routers = self.mesh.place, self.model.routers()
        speaks = not any(place[axis] for axis in place if axis != "pp")
        some = next(iter(self.model.parts.values()))
        device, num_experts = some.rope.inv_freq.device, some.config.moe.num_experts
        bias_LE = torch.zeros(len(layers), num_experts, device=device)
        for row, name in enumerate(layers):
            if speaks and name in routers:
                bias_LE[row] = routers[name].bias
        return self.mesh.world.all_reduce(bias_LE)

    def _biases(self) -> dict[str, Holding]:
        return {f"model.{name}.ffn.gate.bias": router.bias for name, router in self.model.routers().items()}


def build_stage(config: RunConfig, stage: StageConfig, *, device: torch.device, mesh: Mesh) -> StageParts:
    """Build this process's parts of model, engine and schedule of `stage`, initialised from `config.seed`."""
    layout = stage.parallel or config.parallel
    model = build_model(
        config.model,
        layout,
        mesh,
        device=device,
        seed=config.seed,
        seq_len=stage.seq_len,
        yarn=stage.yarn,
        compute=config.precision.compute,
        fp8_dispatch=config.precision.exchanges_codes,
    )
    for part in model.parts.values():
        part.train()
    engine = build_engine(model, config.optimizer, layout)
    scaling = config.precision.loss_scale if config.precision.compute is Compute.fp16 else None
    decay, watch = config.optimizer.ema_decay, watch_of(model)
    return StageParts(
        mesh=mesh,
        model=model,
        engine=engine,
        schedule=build_schedule(model, engine, config, stage, watch),
        loss_scale=LossScale(scaling),
        ema=Ema(engine.masters(), decay=decay) if decay else None,
        watch=watch,
    )


def build_schedule(
    model: ParallelModel, engine: Engine, config: RunConfig, stage: StageConfig, watch: Fp8Watch
) -> Schedule:
    """Return what runs a step's microbatches: a loop, or a pipeline schedule where there are stages."""
    later = WeightGradients()
    codes = install_backend(model.parts.values(), config.precision, later, watch)
    schedule = _build_schedule(model, engine, config, stage, later)
    return Fp8Schedule(schedule, codes) if codes else schedule


def _build_schedule(
    model: ParallelModel, engine: Engine, config: RunConfig, stage: StageConfig, later: WeightGradients
) -> Schedule:
    layout = stage.parallel or config.parallel
    loss_function = objective(model)
    if model.num_stages == 1:
        (part,) = model.parts.values()
        return LocalSchedule(part, loss_function, microbatch_size=layout.microbatch_size, mesh=model.mesh)
    for part in model.parts.values():
        install(part, later)

    def table(num_microbatches: int) -> ActionTable:
        from parallel.pipeline.actions import action_table  # brings torch's compiler: a second a process

        return action_table(
            layout.schedule, pp=layout.pp, chunks=layout.chunks, num_microbatches=num_microbatches
        )

    passes = PipelineSchedule(
        model.parts,
        cache(table),
        pp=model.mesh.pp,
        loss_function=loss_function,
        microbatch_size=layout.microbatch_size,
        weight_gradients=later,
        on_reduce=engine.start_reduce,
        overlap=layout.schedule is PipelineName["dualpipev"],
        tokens_per_share=model.mesh.tp.size,
    )
    return WorldSchedule(passes=passes, config=config.model, mesh=model.mesh)


def objective(model: ParallelModel) -> LossFunction:
    """Return the loss of the model's last part; a rank without it never calls its loss."""
    last, mesh = model.last, model.mesh
    if last is None:
        return Objective(torch.empty(0))
    rows = VocabularyRows(mesh.tp, last.config.vocab_size) if mesh.tp.size > 1 else None
    return Objective(last.head.weight, split=TensorSplit(mesh.tp, mesh.sequence), vocabulary=rows)


def check_multipliers(config: RunConfig) -> None:
    """Raise RunError when a pattern of `optimizer.lr_multipliers` matches no parameter."""
    with torch.device("meta"):
        names = [name for name, _ in Transformer(config.model).named_parameters()]
    unused = [
        glob for glob in config.optimizer.lr_multipliers if not any(fnmatchcase(n, glob) for n in names)
    ]
    if unused:
        raise RunError(
            f"optimizer.lr_multipliers: no parameter matches {', '.join(map(repr, unused))}; "
            f"names look like {names[0]} and {names[-1]}"
        )


def pick_device(config: RunConfig, *, local_rank: int = 0) -> torch.device:
    """Return the device to train on; RunError when CUDA is asked for and absent.

    local_rank: this process's place on its machine, which chooses among several accelerators.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "device=cuda, but this machine or this build of torch has none; use device=cpu or device=auto"
        )
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _named(pattern: str, tensors: dict[str, Holding]) -> dict[str, Holding]:
    return {pattern.format(name): tensor for name, tensor in tensors.items()}
