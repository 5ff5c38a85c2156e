"""Which backend multiplies by the weights inside the blocks, as `precision.gemm` asks.

A backend that quantises keeps the codes of weights for all microbatches of a step. Somebody has to say when
weights have changed: `Fp8Schedule`, at the start of each step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from model.config import Gemm, PrecisionConfig
from model.fp8 import Fp8Policy, install_fp8
from model.fp8_watch import Fp8Watch
from model.weight_gradients import WeightGradients
from parallel.schedule import Batch, Schedule, StepOutput


class WeightCodes(Protocol):
    """Codes of weights."""

    def forget(self) -> None:
        """Drop them; they are made again from the weights as these then are."""
        ...


def install_backend(
    parts: Iterable[nn.Module],
    precision: PrecisionConfig,
    later: WeightGradients,
    watch: Fp8Watch | None = None,
) -> list[WeightCodes]:
    """Let the products inside the blocks of a model's parts be those of `precision.gemm`.

    `later` may put weight gradients off; `watch` counts what quantisation loses, where we quantise. Returns
    whose codes are to be forgotten; nobody's under `gemm=compute`. What the backend needs is there:
    train/requirements.py has looked. Its packages are imported here, by whom they are asked for.
    """
    match precision.gemm:
        case Gemm.compute:
            return []
        case Gemm.fp8_te:
            from model.backends.te import install_te

            return [install_te(part, precision, later) for part in parts]
        case Gemm.fp8_reference:
            policy = Fp8Policy(precision, watch)
        case Gemm.fp8_triton:
            from model.backends.triton import TritonKernels

            policy = Fp8Policy(precision, watch, kernels=TritonKernels())
    for part in parts:
        install_fp8(part, policy, later)
    return [policy.weights]


@dataclass(frozen=True)
class Fp8Schedule:
    """A schedule whose microbatches share the codes of the weights, made anew in each step."""

    schedule: Schedule
    codes: Sequence[WeightCodes]

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> StepOutput:
        """Forget the codes, since the weights may have changed, and run the step; see `Schedule.step`."""
        for each in self.codes:
            each.forget()
        return self.schedule.step(batch, mtp_weight=mtp_weight, loss_scale=loss_scale)
