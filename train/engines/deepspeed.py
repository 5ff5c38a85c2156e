"""The second engine: DeepSpeed's ZeRO optimizers, stages 1 to 3 (arXiv 1910.02054), and CPU offload.

Only the optimizers of DeepSpeed are used, not the engine that it wraps around a model. That one would cast
the whole model to one type, divide gradients by numbers of processes and count microbatches: all this is
settled already. So model, schedules and loss are the same under both engines, and checkpoints of one load
into the other.

    deepspeed_start       process groups, and no compilation
    deepspeed_groups      parameters by type, rule and processes; where they lie in DeepSpeed's flat tensors
    deepspeed_optimizer   what is common to the stages: the norm from outside, the end of a backward pass
    deepspeed_stage12     whole weights
    deepspeed_stage3      weights in shards
    flat_adamw            the optimizer that DeepSpeed calls
"""

from contextlib import AbstractContextManager

import torch
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from torch import Tensor

from parallel.config import Offload, ParallelConfig
from parallel.model import ParallelModel
from parallel.pieces import Holding
from train.config import OptimizerConfig
from train.engines.deepspeed_groups import ParameterGroup, parameter_groups
from train.engines.deepspeed_optimizer import Clip, ZeroStage
from train.engines.deepspeed_stage3 import ShardedWeights
from train.engines.deepspeed_stage12 import ShardedState
from train.engines.deepspeed_start import Handles
from train.engines.engine import Update
from train.engines.flat_adamw import FlatAdamW

_NORM_ELEMENTS = 1 << 22
"""Gradients whose norm is taken at a time: in FP64, 32 MiB."""


class DeepSpeedEngine:
    """`train.engines.engine.Engine` on the parameters of this process's parts of the model."""

    def __init__(self, model: ParallelModel, config: OptimizerConfig, parallel: ParallelConfig) -> None:
        self._world = model.mesh.world
        self._groups = parameter_groups(model, config)
        self._optimizer = FlatAdamW([group.for_optimizer() for group in self._groups], config)
        self._zero = _stage(model, self._groups, self._optimizer, parallel)
        self._optimizer.begin(self._zero.flats)
        self._gradients: list[Tensor] = []

    @property
    def num_updates(self) -> int:
        """Return the updates made since the moments began."""
        return self._optimizer.num_updates

    def start_reduce(self, stage: int) -> None:
        """Do nothing: DeepSpeed sums all gradients together."""

    def reduce(self) -> None:
        """Sum all gradients; afterwards each process has the range it owns."""
        self._gradients = self._zero.reduce()

    def gradients(self) -> dict[str, Holding]:
        """Return the summed gradients owned here, as views."""
        return self._holdings(self._gradients, name="{}")

    def update(self, *, lr: float, max_norm: float, loss_scale: float, finite: bool) -> Update:
        """Clip, update, publish and clear the gradients; see `Engine.update`."""
        norm = self._grad_norm()
        usable = finite and bool(torch.isfinite(norm))
        self._optimizer.set_lr(lr)
        self._optimizer.num_updates += usable
        given = norm if usable else torch.full_like(norm, torch.inf)
        self._zero.update(Clip(norm=given, max_norm=max_norm, loss_scale=loss_scale))
        self._gradients = []
        return Update(grad_norm=float(norm) / loss_scale, skipped=not usable)

    def masters(self) -> dict[str, Tensor]:
        """Return the FP32 masters owned here, one flat tensor for each of DeepSpeed's groups."""
        return {str(index): flat.detach() for index, flat in enumerate(self._zero.flats)}

    def weights(self) -> dict[str, Holding]:
        """Return the FP32 masters by parameter, as views."""
        return self.stored_like_masters(self.masters())

    def stored_like_masters(self, flats: dict[str, Tensor]) -> dict[str, Holding]:
        """Return by parameter what tensors that are shaped like `masters` hold of it, as views."""
        return self._holdings(list(flats.values()), name="{}")

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters have all their values."""
        return self._zero.whole_parameters()

    def moments(self) -> dict[str, Holding]:
        """Return AdamW's moments by parameter, as views."""
        held: dict[str, Holding] = {}
        for key, flats in self._optimizer.moments().items():
            held |= self._holdings(flats, name="{}." + key)
        return held

    def use_loaded(self, *, num_updates: int) -> None:
        """Publish the masters that were just written."""
        self._zero.publish()
        self._optimizer.num_updates = num_updates

    def reset(self) -> None:
        """Forget both moments."""
        self._optimizer.reset()

    def _holdings(self, flats: list[Tensor], *, name: str) -> dict[str, Holding]:
        return {name.format(parameter): place.of(flats) for parameter, place in self._zero.places.items()}

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradients, loss scale included; FP32 scalar.

        Equal on all processes; they own different elements, but for replicas.
        """
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float64).square() / group.reduction.replicate.size
            for flat, group in zip(self._gradients, self._groups, strict=True)
            for part in flat.split(_NORM_ELEMENTS)  # each is copied to FP64
        ]
        return self._world.all_reduce(torch.stack(squares).sum()).sqrt().float()


def _stage(
    model: ParallelModel, groups: list[ParameterGroup], optimizer: FlatAdamW, parallel: ParallelConfig
) -> ZeroStage:
    """Hand the parameters to DeepSpeed."""
    first = next(iter(groups[0].named.values()))
    for group in groups:
        for parameter in group.named.values():
            parameter.grad_dtype = torch.float32
    handles = Handles(first.device)
    offload = None
    if parallel.offload is Offload.cpu:
        settings = {"device": "cpu", "pin_memory": first.device.type == "cuda"}
        offload = DeepSpeedZeroOffloadOptimizerConfig.model_validate(settings)
    common = (groups, optimizer, model.sharding, handles)
    if parallel.zero_stage == 3:
        (part,) = model.parts.values()
        return ShardedWeights(part, *common, offload=offload)
    return ShardedState(*common, shard_gradients=parallel.zero_stage == 2, offload=offload)
