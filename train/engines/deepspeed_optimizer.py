"""What DeepSpeed's ZeRO optimizers are given here in place of what they would find out themselves.

The norm. DeepSpeed adds up norms group by group over the data-parallel ranks and then over one "model
parallel" group. Every pipeline rank would have to hold the same groups of parameters, but one may have
experts and another none. The engine measures one norm over all processes; DeepSpeed clips by it, and skips
the update if it is not finite.

The end of a backward pass. Stages 2 and 3 sum gradients while a backward pass goes on and have to hear when
it is over. DeepSpeed's own engine learns that from the loss which goes through it. Here DeepSpeed is told to
be always inside a pass, and finds the end of each from autograd.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.cost import DEEPSPEED_BUCKET_ELEMENTS
from train.engines.deepspeed_groups import Place

BUCKET_ELEMENTS = DEEPSPEED_BUCKET_ELEMENTS
"""Gradients that are summed together: 256 MiB. A constant, since processes with different parameters (both
ends of a pipeline) share collectives, which must be cut alike."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What to do with the gradients: norm of them as they are, the norm to clip to, the factor in them."""

    norm: Tensor
    """Infinite to skip the update."""
    max_norm: float
    loss_scale: float


class ZeroStage(Protocol):
    """A stage of ZeRO as the engine uses it; every list is by flat tensor of this process."""

    @property
    def places(self) -> dict[str, Place]:
        """Return by parameter where it lies in the flat tensors."""
        ...

    @property
    def flats(self) -> list[Tensor]:
        """Return the FP32 master weights owned here: the tensors that DeepSpeed hands to the optimizer."""
        ...

    def reduce(self) -> list[Tensor]:
        """Return the gradients owned here, summed; `update` works on these tensors."""
        ...

    def update(self, clip: Clip) -> None:
        """Clip, let the optimizer step, publish the weights, forget the gradients."""
        ...

    def publish(self) -> None:
        """Write the masters to the parameters, on all processes."""
        ...

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters have all their values."""
        ...


def offloaded_gradients(flats: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients that DeepSpeed keeps beside masters in CPU memory, once they have arrived."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return [flat.grad for flat in flats if flat.grad is not None]


def take_step(optimizer: Any, clip: Clip) -> None:
    """Let DeepSpeed clip the gradients by the norm that is given to it and step; see `Clip`."""
    optimizer.given_norm = clip.norm
    optimizer.clip_grad = clip.max_norm
    optimizer.override_loss_scale(clip.loss_scale)
    optimizer.step()


def after_each_backward(optimizer: Any) -> None:
    """Let the optimizer put away its gradients at the end of every backward pass from now on."""

    def end() -> None:
        with torch.no_grad():
            optimizer.overlapping_partition_gradients_reduce_epilogue()
            optimizer.backward_epilogue()
        optimizer.exit_backward()
        optimizer.clear_backward_seen_flag()
        optimizer.enter_backward()

    optimizer.register_grad_acc_post_hook(end)
    optimizer.enter_backward()
    # nothing is final before the engine says so, however many passes a step has
    optimizer.set_gradient_accumulation_boundary(False)
