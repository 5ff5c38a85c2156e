"""From a configuration to the objects that train one stage."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from model.config import Compute
from model.init import initialize
from model.transformer import Transformer
from parallel.schedule import LocalSchedule
from parallel.zero1 import Zero1
from train.config import RunConfig, StageConfig
from train.ema import Ema
from train.errors import RunError
from train.loss import Objective
from train.loss_scale import LossScale
from train.optimizer import AdamW, parameter_rule


@dataclass(frozen=True, kw_only=True)
class StageParts:
    """Everything that trains one stage. A checkpoint is written from `tensors()` and restored into them."""

    model: Transformer
    engine: Zero1
    optimizer: AdamW
    schedule: LocalSchedule
    loss_scale: LossScale
    ema: Ema | None

    def masters(self) -> dict[str, Tensor]:
        """Return the FP32 master weights by parameter name."""
        return self.engine.named_views([bucket.master for bucket in self.engine.buckets])

    def weights(self) -> dict[str, Tensor]:
        """Return FP32 master weights and router biases by checkpoint name."""
        return {f"model.{name}": tensor for name, tensor in self.masters().items()} | self._biases()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of a checkpoint by name."""
        average = self.ema.tensors() if self.ema else {}
        return self.optimizer.state_tensors() | self._biases() | average

    def use_loaded(self, *, num_updates: int) -> None:
        """Compute from the masters that were just written, `num_updates` updates after the moments began."""
        self.engine.publish()
        self.optimizer.num_updates = num_updates

    def _biases(self) -> dict[str, Tensor]:
        return {f"model.{name}.ffn.gate.bias": router.bias for name, router in self.model.routers().items()}


def build_stage(config: RunConfig, stage: StageConfig, *, device: torch.device) -> StageParts:
    """Build model, engine, optimizer and schedule of `stage`, initialised from `config.seed`."""
    layout = stage.parallel or config.parallel
    with device:
        model = Transformer(
            config.model, yarn=stage.yarn, recompute=layout.recompute, compute=config.precision.compute
        )
    initialize(model, seed=config.seed)
    model.train()
    engine = Zero1(model.named_parameters(), rule=parameter_rule(config.optimizer))
    scaling = config.precision.loss_scale if config.precision.compute is Compute.fp16 else None
    masters = engine.named_views([bucket.master for bucket in engine.buckets])
    return StageParts(
        model=model,
        engine=engine,
        optimizer=AdamW(engine, config.optimizer),
        schedule=LocalSchedule(model, Objective(model.head.weight), microbatch_size=layout.microbatch_size),
        loss_scale=LossScale(scaling),
        ema=Ema(masters, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
    )


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


def pick_device(config: RunConfig) -> torch.device:
    """Return the device to train on; RunError when CUDA is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "device=cuda, but this machine or this build of torch has none; use device=cpu or device=auto"
        )
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
