"""Exponential moving average of the weights, kept in CPU memory (arXiv 2412.19437, section 3.2.3).

The average follows the FP32 masters, so it is not limited by the compute type. `update` copies a tensor at
a time and returns when the average has moved: on a CPU there is nothing to overlap, and on a GPU the copies
wait for the step that precedes them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """average <- decay * average + (1 - decay) * weights, once per update that was not skipped.

    Args:
        weights: tensors by name; the average starts at their values, so it needs no bias correction.
        decay: share of the average that an update keeps, in (0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        self._decay = decay
        self.restart(weights)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards `weights`, which must have the names it was built with.

        Raises:
            ValueError: if names are missing or new.
        """
        if weights.keys() != self._average.keys():
            differing = sorted(weights.keys() ^ self._average.keys())
            raise ValueError(f"the average and the weights differ in {', '.join(differing)}")
        for name, average in self._average.items():
            average.lerp_(_on_cpu(weights[name]), 1.0 - self._decay)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Begin the average anew at `weights`."""
        self._average = {name: _on_cpu(tensor).clone() for name, tensor in weights.items()}

    def averages(self) -> dict[str, Tensor]:
        """Return the average by name; writing into the tensors restores it."""
        return dict(self._average)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
