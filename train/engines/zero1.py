"""The default engine: flat buckets (parallel/zero1.py) under AdamW (train/optimizer.py)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from parallel.model import ParallelModel
from parallel.pieces import Holding
from parallel.zero1 import Zero1
from train.config import OptimizerConfig
from train.engines.engine import Update
from train.optimizer import AdamW, clip_grad_norm, parameter_rule


class Zero1Engine:
    """`train.engines.engine.Engine` on the parameters of this process's parts of the model."""

    def __init__(self, model: ParallelModel, config: OptimizerConfig) -> None:
        completing = model.completing_stages()
        self.buckets = Zero1(
            model.named_parameters().items(),
            rule=parameter_rule(config),
            share=model.sharding.share,
            reduction=model.sharding.reduction,
            stage=completing.__getitem__,
            world=model.mesh.world,
        )
        self.optimizer = AdamW(self.buckets, config)

    @property
    def num_updates(self) -> int:
        """Return the updates made since the moments began."""
        return self.optimizer.num_updates

    def start_reduce(self, stage: int) -> None:
        """Begin the reduce-scatters of the buckets of a pipeline stage."""
        self.buckets.start_reduce(stage)

    def reduce(self) -> None:
        """Sum all gradients; afterwards each process has the range it owns."""
        self.buckets.finish_reduce()

    def gradients(self) -> dict[str, Holding]:
        """Return the summed gradients owned here, as views."""
        return self.buckets.stored([bucket.own_grad for bucket in self.buckets.buckets], name="{}")

    def update(self, *, lr: float, max_norm: float, loss_scale: float, finite: bool) -> Update:
        """Clip, update, publish and clear the gradients; see `Engine.update`."""
        norm = clip_grad_norm(self.buckets, max_norm=max_norm, loss_scale=loss_scale)
        usable = finite and bool(torch.isfinite(norm))
        if usable:
            self.optimizer.step(lr=lr)
        self.buckets.zero_grad()
        return Update(grad_norm=float(norm), skipped=not usable)

    def masters(self) -> dict[str, Tensor]:
        """Return the masters of each bucket that this process owns."""
        return {str(i): master for i, master in enumerate(self.buckets.masters())}

    def weights(self) -> dict[str, Holding]:
        """Return the FP32 masters by parameter, as views."""
        return self.stored_like_masters(self.masters())

    def stored_like_masters(self, flats: dict[str, Tensor]) -> dict[str, Holding]:
        """Return by parameter what tensors that are shaped like `masters` hold of it, as views."""
        return self.buckets.stored(list(flats.values()), name="{}")

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: parameters are always whole."""
        return nullcontext()

    def moments(self) -> dict[str, Holding]:
        """Return AdamW's moments by parameter, as views."""
        return self.optimizer.moments()

    def use_loaded(self, *, num_updates: int) -> None:
        """Publish the masters that were just written."""
        self.buckets.publish()
        self.optimizer.num_updates = num_updates

    def reset(self) -> None:
        """Forget both moments."""
        self.optimizer.reset()
