"""AdamW (arXiv 1711.05101) on the flat FP32 masters of a `Zero1` engine, with FP32 or BF16 moments.

Each process updates the range of every bucket that it owns, and keeps moments for that range alone.

DeepSeek-V3 keeps masters and gradients in FP32 and both moments in BF16 (arXiv 2412.19437, section
3.3.3). The arithmetic is FP32 either way: the update walks each bucket in chunks, widens a chunk of the
moments, lets torch's fused AdamW update it, rounds it back and writes the new parameters in the compute
type, so temporaries are two chunks whatever the model's size and every tensor is read once.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.bucket import ParameterRule
from parallel.pieces import Holding
from parallel.zero1 import Zero1
from train.config import Moments, OptimizerConfig

CPU_CHUNK = 1 << 18
"""Elements updated together on a CPU: a chunk's working set of 6 MiB stays in cache between the passes."""

_ACCELERATOR_CHUNK = 1 << 24
"""Elements updated together elsewhere: enough that a kernel outlasts its launch."""


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


class FlatState(NamedTuple):
    """FP32 weights with their FP32 gradient and FP32 or BF16 moments, flat, of one length."""

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


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


def update_flat(
    flats: FlatState, config: OptimizerConfig, *, num_updates: int, lr: float, decay: bool
) -> Iterator[slice]:
    """Update a flat tensor chunk by chunk; yield each chunk when it is done.

    Args:
        flats: the FP32 weights, their FP32 gradient, and the moments, all of one length.
        config: rates of the moments, epsilon, weight decay.
        num_updates: updates since the moments began, this one included.
        lr: the learning rate of these weights.
        decay: whether weight decay applies to them.
    """
    device = flats.weights.device
    count = torch.tensor(float(num_updates), device=device)
    size = CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK
    for start in range(0, flats.weights.numel(), size):
        chunk = slice(start, start + size)
        exp_avg, exp_avg_sq = flats.exp_avg[chunk], flats.exp_avg_sq[chunk]
        wide_avg, wide_avg_sq = exp_avg.float(), exp_avg_sq.float()  # the moments themselves if FP32
        torch._fused_adamw_(
            [flats.weights[chunk]],
            [flats.gradient[chunk]],
            [wide_avg],
            [wide_avg_sq],
            [],
            [count],
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=config.weight_decay if decay else 0.0,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )
        if wide_avg is not exp_avg:
            exp_avg.copy_(wide_avg)
            exp_avg_sq.copy_(wide_avg_sq)
        yield chunk
