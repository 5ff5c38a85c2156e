"""One update of AdamW (arXiv 1711.05101) on flat FP32 weights, with FP32 or BF16 moments.

DeepSeek-V3 keeps masters and gradients in FP32 and both moments in BF16 (arXiv 2412.19437, section 3.3.3).
The arithmetic is FP32 either way. Flat tensors are walked in chunks, so that whoever publishes the new
weights finds them in cache, and temporaries are two chunks whatever the model's size.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.config import AdamKernel, OptimizerConfig

CPU_CHUNK = 1 << 18
"""Elements updated together on a CPU: a chunk's working set of 6 MiB stays in cache between the passes."""

_ACCELERATOR_CHUNK = 1 << 24
"""Elements updated together elsewhere: enough that a kernel outlasts its launch."""


class FlatState(NamedTuple):
    """FP32 weights with their FP32 gradient and FP32 or BF16 moments, flat, of one length."""

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Step(NamedTuple):
    config: OptimizerConfig
    num_updates: int
    count: Tensor  # the same on the device, made once: to make one waits for the device
    lr: float
    weight_decay: float


def update_flat(
    flats: FlatState, config: OptimizerConfig, *, num_updates: int, lr: float, decay: bool
) -> Iterator[slice]:
    """Update a flat tensor chunk by chunk; yield each chunk when it is done.

    Args:
        flats: the FP32 weights, their FP32 gradient, and the moments, all of one length.
        config: rates of the moments, epsilon, weight decay, and what computes.
        num_updates: updates since the moments began, this one included.
        lr: the learning rate of these weights.
        decay: whether weight decay applies to them.
    """
    update = {AdamKernel.torch: _torch, AdamKernel.transformer_engine: _transformer_engine}[config.kernel]
    count = torch.tensor(float(num_updates), device=flats.weights.device)
    step = _Step(config, num_updates, count, lr, config.weight_decay if decay else 0.0)
    size = CPU_CHUNK if flats.weights.device.type == "cpu" else _ACCELERATOR_CHUNK
    for start in range(0, flats.weights.numel(), size):
        chunk = slice(start, start + size)
        update(FlatState(*(flat[chunk] for flat in flats)), step)
        yield chunk


def _torch(flats: FlatState, step: _Step) -> None:
    """Widen the moments, let torch's fused AdamW update them, and round them back."""
    wide_avg, wide_avg_sq = flats.exp_avg.float(), flats.exp_avg_sq.float()  # the moments themselves if FP32
    torch._fused_adamw_(
        [flats.weights],
        [flats.gradient],
        [wide_avg],
        [wide_avg_sq],
        [],
        [step.count],
        lr=step.lr,
        beta1=step.config.beta1,
        beta2=step.config.beta2,
        weight_decay=step.weight_decay,
        eps=step.config.eps,
        amsgrad=False,
        maximize=False,
    )
    if wide_avg is not flats.exp_avg:
        flats.exp_avg.copy_(wide_avg)
        flats.exp_avg_sq.copy_(wide_avg_sq)


def _transformer_engine(flats: FlatState, step: _Step) -> None:
    """Launch the kernel of Transformer Engine's FusedAdam, which reads and writes BF16 moments itself.

    The optimizer around it is not used: it would own the state, which here is flat, split over processes and
    stored by parameter.
    """
    optimizers: Any = import_module("transformer_engine.pytorch.optimizers")
    never_skip = torch.zeros(1, dtype=torch.int32, device=flats.weights.device)
    decoupled_decay, bias_correction = 1, 1
    optimizers.multi_tensor_applier(
        optimizers.multi_tensor_adam,
        never_skip,
        [[flats.gradient], [flats.weights], [flats.exp_avg], [flats.exp_avg_sq]],
        step.lr,
        step.config.beta1,
        step.config.beta2,
        step.config.eps,
        step.num_updates,
        decoupled_decay,
        bias_correction,
        step.weight_decay,
    )
