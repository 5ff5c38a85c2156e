"""AdamW (arXiv 1711.05101) as an optimizer that DeepSpeed can call, on the flat FP32 tensors it makes.

The arithmetic, the rules and the storage of the moments are those of train/adamw.py. DeepSpeed calls
`step` once for every flat tensor, so who drives it counts the updates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.adamw import FlatState, update_flat
from train.config import Moments, OptimizerConfig


class FlatAdamW(torch.optim.Optimizer):
    """AdamW with FP32 or BF16 moments, whose groups have `decay` and `lr_multiplier`.

    `num_updates`: the updates made since the moments began, this one included while `step` runs.
    """

    num_updates: int

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": 0.0, "decay": True, "lr_multiplier": 1.0})
        self._config = config
        self._moment_type = torch.bfloat16 if config.moments is Moments.bf16 else torch.float32
        self.num_updates = 0

    def begin(self, flats: Sequence[Tensor]) -> None:
        """Make the moments of the flat tensors that `step` will see, all zero."""
        self._flats = list(flats)
        for flat in flats:
            self.state[flat] = {
                name: torch.zeros_like(flat, dtype=self._moment_type, requires_grad=False)
                for name in ("exp_avg", "exp_avg_sq")
            }

    def moments(self) -> dict[str, list[Tensor]]:
        """Return the moments of the flat tensors, in their order, by name."""
        return {name: [self.state[flat][name] for flat in self._flats] for name in ("exp_avg", "exp_avg_sq")}

    def reset(self) -> None:
        """Forget both moments, as at the start of a run."""
        self.num_updates = 0
        for flats in self.moments().values():
            for moment in flats:
                moment.zero_()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update; each group multiplies it by its factor."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_multiplier"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every tensor of the present groups from its FP32 `grad`."""
        for group in self.param_groups:
            for flat in group["params"]:
                self._update(flat, self.state[flat], group)

    def _update(self, flat: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        gradient: Any = flat.grad
        flats = FlatState(flat, gradient, state["exp_avg"], state["exp_avg_sq"])
        chunks = update_flat(
            flats, self._config, num_updates=self.num_updates, lr=group["lr"], decay=group["decay"]
        )
        for _ in chunks:
            pass  # nothing follows a chunk: DeepSpeed publishes the weights
