"""What the trainer asks of an optimizer engine, whichever it is."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from parallel.pieces import Holding


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an engine did with a step's gradients."""

    grad_norm: float
    """L2 norm of the whole model's gradients before clipping."""
    skipped: bool
    """Whether the step was left out because something was not finite."""


class Engine(Protocol):
    """Gradients, FP32 masters and moments, spread over processes.

    A step is: backward passes, `reduce`, `update`. Whatever a process holds of a tensor has its name in the
    whole model; entries are whole tensors, or pieces of them.
    """

    @property
    def num_updates(self) -> int:
        """Return the updates made since the moments began."""
        ...

    def start_reduce(self, stage: int) -> None:
        """Begin to sum the gradients that are complete once a pipeline stage is done."""
        ...

    def reduce(self) -> None:
        """Sum all gradients over the processes; return when they are complete."""
        ...

    def gradients(self) -> dict[str, Holding]:
        """Return the summed gradients that this process owns, by parameter; between `reduce` and `update`."""
        ...

    def update(self, *, lr: float, max_norm: float, loss_scale: float, finite: bool) -> Update:
        """Clip, update weights and moments, publish the weights, and clear the gradients.

        Nothing but the clearing happens where `finite` is false or the gradient norm is not finite.

        Args:
            lr: the learning rate of this step.
            max_norm: the norm to clip to.
            loss_scale: the factor that is in the gradients.
            finite: whether the loss was finite; equal on all processes.
        """
        ...

    def masters(self) -> dict[str, Tensor]:
        """Return the FP32 master weights owned here, as flat tensors by a name of the engine's own."""
        ...

    def weights(self) -> dict[str, Holding]:
        """Return the FP32 master weights by parameter."""
        ...

    def stored_like_masters(self, flats: dict[str, Tensor]) -> dict[str, Holding]:
        """Return by parameter what flat tensors that are shaped like `masters` hold of it, as views."""
        ...

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Return a context in which the model's parameters, which must not be written, have all their values.

        All processes enter and leave it together.
        """
        ...

    def moments(self) -> dict[str, Holding]:
        """Return the optimizer's moments by "PARAMETER.exp_avg" and "PARAMETER.exp_avg_sq"."""
        ...

    def use_loaded(self, *, num_updates: int) -> None:
        """Compute from the masters that were just written, `num_updates` updates after the moments began."""
        ...

    def reset(self) -> None:
        """Forget both moments, as at the start of a run."""
        ...
