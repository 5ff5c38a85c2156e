"""Dynamic loss scaling for FP16 (arXiv 1710.03740, section 3.2).

FP16 gradients underflow where FP32 ones would not. Everything that is differentiated is multiplied by a
scale that grows while gradients stay finite and shrinks when they overflow; the step that overflowed is
skipped.
"""

from typing import Any

from model.config import LossScaleConfig


class LossScale:
    """The current scale and the rule by which it moves.

    Args:
        config: growth and back-off; None for BF16 and FP32, whose scale is 1 and stays 1.
    """

    value: float
    """The factor on the next step's loss."""

    def __init__(self, config: LossScaleConfig | None) -> None:
        self._config = config
        self._finite_in_a_row = 0
        self.value = config.initial if config else 1.0

    def update(self, finite: bool) -> None:
        """Move the scale after a step: `finite` says whether its loss and gradients were finite."""
        if self._config is None:
            return
        if not finite:
            self.value = max(self._config.minimum, self.value * self._config.backoff_factor)
            self._finite_in_a_row = 0
            return
        self._finite_in_a_row += 1
        if self._finite_in_a_row == self._config.growth_interval:
            grown = self.value * self._config.growth_factor
            # An infinite scale would make every later step overflow; keep the last finite one.
            self.value = grown if grown < float("inf") else self.value
            self._finite_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values; empty where no scaling is used."""
        if self._config is None:
            return {}
        return {"value": self.value, "finite_in_a_row": self._finite_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; an empty state, of a run without scaling, starts anew."""
        if self._config is None or not state:
            return
        self.value = float(state["value"])
        self._finite_in_a_row = int(state["finite_in_a_row"])
