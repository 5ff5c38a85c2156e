"""AdamW (arXiv 1711.05101) on the flat FP32 masters of a `Zero1` engine, with FP32 or BF16 moments.

Each process updates the range of every bucket that it owns, and keeps moments for that range alone. The
arithmetic is in train/adamw.py.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from parallel.bucket import ParameterRule
from parallel.pieces import Holding
from parallel.zero1 import Zero1
from train.adamw import FlatState, update_flat
from train.config import Moments, OptimizerConfig


def parameter_rule(config: OptimizerConfig) -> Callable[[str, nn.Parameter], ParameterRule]:
    """Return the rule of a parameter by name and shape.

    Weight decay applies to matrices (two dimensions or more), not to norms and biases. The factor on the
    learning rate is that of the first pattern of `lr_multipliers` that matches the name, else 1.
    """

    def rule(name: str, parameter: nn.Parameter) -> ParameterRule:
        factors = (factor for glob, factor in config.lr_multipliers.items() if fnmatchcase(name, glob))
        return ParameterRule(decay=parameter.dim() >= 2, lr_multiplier=next(factors, 1.0))

    return rule


@torch.no_grad()
def clip_grad_norm(engine: Zero1, *, max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Divide the gradients by `loss_scale` and clip them to `max_norm`; return the norm before clipping.

    Equal to `torch.nn.utils.clip_grad_norm_` on the unscaled gradients, in one pass over them. The result
    is an FP32 scalar; where it is not finite the gradients are worthless and the step must be skipped.
    """
    norm = engine.grad_norm() / loss_scale
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    engine.scale_grad(clip / loss_scale)
    return norm


class AdamW:
    """The optimizer: one pair of flat moments per bucket of the engine.

    `num_updates` counts the steps taken, for the bias correction; who restores the state sets it.
    """

    num_updates: int

    def __init__(self, engine: Zero1, config: OptimizerConfig) -> None:
        dtype = torch.bfloat16 if config.moments is Moments.bf16 else torch.float32
        self.num_updates = 0
        self._engine = engine
        self._config = config
        self._exp_avg = [torch.zeros_like(bucket.master, dtype=dtype) for bucket in engine.buckets]
        self._exp_avg_sq = [torch.zeros_like(bucket.master, dtype=dtype) for bucket in engine.buckets]

    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """Update the masters from the buckets' gradients and publish them to the model.

        Args:
            lr: this step's learning rate; each bucket multiplies it by its rule's factor.
        """
        self.num_updates += 1
        for bucket, exp_avg, exp_avg_sq in zip(
            self._engine.buckets, self._exp_avg, self._exp_avg_sq, strict=True
        ):
            state = FlatState(bucket.master, bucket.own_grad, exp_avg, exp_avg_sq)
            rate, decay = lr * bucket.rule.lr_multiplier, bucket.rule.decay
            for chunk in update_flat(state, self._config, num_updates=self.num_updates, lr=rate, decay=decay):
                bucket.publish(chunk.start, chunk.stop)
        self._engine.gather()

    def reset(self) -> None:
        """Forget both moments, as at the start of a run."""
        self.num_updates = 0
        for moment in self.moment_tensors():
            moment.zero_()

    def moment_tensors(self) -> list[Tensor]:
        """Return the flat moments of all buckets."""
        return [*self._exp_avg, *self._exp_avg_sq]

    def moments(self) -> dict[str, Holding]:
        """Return both moments by parameter, as views; who loads into them sets `num_updates` as well."""
        first = self._engine.stored(self._exp_avg, name="{}.exp_avg")
        return first | self._engine.stored(self._exp_avg_sq, name="{}.exp_avg_sq")
