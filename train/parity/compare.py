"""Hold what the processes of a layout recorded against one process: every tensor, every element.

The boxes of all processes must cover a tensor exactly; where several hold the same box (replicas), each copy
is compared. The distance of a tensor is the largest difference over the largest magnitude in the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.parity.task import Boxes, Record

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a layout may be from one process."""

    loss: float = TOLERANCE
    gradient: float = TOLERANCE
    grad_norm: float = TOLERANCE
    parameter: float = TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The largest distance among tensors, and whose it is."""

    distance: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the matrix: distances from one process, over both steps."""

    layout: str
    world_size: int
    loss: float
    balance_loss: float
    gradient: Worst
    grad_norm: float
    parameter: Worst
    bias: float
    load: bool
    """Whether every expert's exact count is the same."""
    tolerance: Tolerance = Tolerance()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether everything is within the tolerance."""
        limit = self.tolerance
        # written so that NaN fails
        return (
            self.load
            and max(self.loss, self.balance_loss, self.bias) <= limit.loss
            and self.grad_norm <= limit.grad_norm
            and self.gradient.distance <= limit.gradient
            and self.parameter.distance <= limit.parameter
        )


def compare(layout: str, records: Sequence[Record], reference: Record) -> Row:
    """Return the distances of a layout, recorded by each of its processes, from one process."""
    first = records[0].steps
    loss = max(
        _relative(torch.tensor(step.loss_K), torch.tensor(expected.loss_K))
        for record in records
        for step, expected in zip(record.steps, reference.steps, strict=True)
    )
    scalars = [
        (mine, theirs)
        for record in records
        for mine, theirs in zip(record.steps, reference.steps, strict=True)
    ]
    gradients = [
        _worst([record.steps[i].gradients for record in records], reference.steps[i].gradients)
        for i in range(len(first))
    ]
    return Row(
        layout=layout,
        world_size=len(records),
        loss=loss,
        balance_loss=max(_ratio(mine.balance_loss, theirs.balance_loss) for mine, theirs in scalars),
        gradient=max(gradients, key=lambda worst: worst.distance),
        grad_norm=max(_ratio(mine.grad_norm, theirs.grad_norm) for mine, theirs in scalars),
        parameter=_worst([record.parameters for record in records], reference.parameters),
        bias=_bias_distance(records, reference),
        load=all(torch.equal(mine.load_LE, theirs.load_LE) for mine, theirs in scalars),
    )


def _bias_distance(records: Sequence[Record], reference: Record) -> float:
    held = {name for record in records for name in record.biases}
    if held != reference.biases.keys():
        return float("inf")
    return max(
        float((bias - reference.biases[name]).abs().max())
        for record in records
        for name, bias in record.biases.items()
    )


def _worst(held: Sequence[Boxes], reference: Boxes) -> Worst:
    """Return the tensor that is farthest from the reference; one that is not covered is infinitely far."""
    worst = Worst(distance=0.0, name="")
    names = reference.keys() | {name for boxes in held for name in boxes}
    for name in sorted(names):
        distance = _distance([boxes[name] for boxes in held if name in boxes], reference.get(name, []))
        if not distance <= worst.distance:  # NaN is worst of all
            worst = Worst(distance=distance, name=name)
    return worst


def _distance(
    held: Sequence[list[tuple[tuple[int, ...], Tensor]]], reference: list[tuple[tuple[int, ...], Tensor]]
) -> float:
    if len(reference) != 1:
        return float("inf")
    expected = reference[0][1]
    covered = torch.zeros(expected.shape, dtype=torch.bool)
    difference = torch.zeros(())
    for offsets, values in (box for boxes in held for box in boxes):
        place = tuple(slice(a, a + n) for a, n in zip(offsets, values.shape, strict=True))
        if values.numel() == 0:
            continue
        covered[place] = True
        difference = torch.maximum(difference, (values - expected[place]).abs().max())
    if not covered.all():
        return float("inf")
    return float(difference / expected.abs().max().clamp_min(1e-30))


def _relative(mine: Tensor, theirs: Tensor) -> float:
    return float(((mine - theirs).abs() / theirs.abs().clamp_min(1e-30)).max())


def _ratio(mine: float, theirs: float) -> float:
    return abs(mine - theirs) / max(abs(theirs), 1e-30)
