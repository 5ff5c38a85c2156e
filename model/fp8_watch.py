"""A watch on FP8: how much of what is multiplied its codes lose, counted on request.

E4M3 spans 2^-9 to 448 times a tile's scale. Three quantities say whether the scales place tensors well in it:

    underflow    of the elements that are not zero, the share whose code is: they lie below 2^-10 of the scale
    saturated    of the same elements, the share at the largest code, 448
    amax         the largest magnitude, infinity where an element is not finite

A scale of max |x| / 448 puts the largest element of each tile at 448, so at least 1 of 128 is saturated where
tiles are full; a power of two puts it there or up to one binade lower. Much more than that is a scale that is
too small; underflow that grows is a tensor whose magnitudes spread beyond what one tile can hold.

Tensors are counted when they are differentiated, not when they are quantised. A tensor that is computed again
for the backward pass is quantised again, by whatever recomputes it, but differentiated once. What is measured
in the forward pass therefore waits as a `Sample`, kept with what is saved for the backward pass.

While a watch is not active it costs one comparison for each tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.fp8 import Quantized

_MAGNITUDE = 0x7F
"""The bits of a code without its sign."""
_LARGEST = 0x7E
"""The magnitude bits of 448; 0x7F is NaN."""


class TensorClass(StrEnum):
    """What a quantised tensor is to the products."""

    WEIGHTS = "weights"
    """Weights of linear maps and experts, once a step."""
    ACTIVATIONS = "activations"
    """Inputs of linear maps, and of the experts' down projections."""
    EXPERT_ROWS = "expert_rows"
    """Rows that the routed experts are given, whether they are quantised before they travel or behind."""
    GRADIENTS = "gradients"
    """Gradients of the outputs of linear maps and of the experts' three projections, in 1 x 128 tiles."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a watch has counted, by place of the class in TensorClass."""

    counts: Tensor
    """Elements that are not zero, that underflow, that are saturated: int64 [4, 3]."""
    amax: Tensor
    """FP32 [4]; 0 of a class without elements."""


@dataclass
class Sample:
    """One quantised tensor as measured, to be counted once."""

    kind: TensorClass
    counts_3: Tensor
    amax: Tensor
    counted: bool = field(default=False)


class Fp8Watch:
    """Counts what FP8 loses while it is active.

    others_count: weights that are held here, but counted where another copy of them is.
    arrives_coded: whether rows, and gradients of the experts' output, were FP8 codes on their way here. What
    is quantised here is then a decoded tensor, whose small elements are zero already: whoever coded it
    counts it.
    """

    def __init__(self, others_count: Iterable[Tensor] = (), *, arrives_coded: bool = False) -> None:
        self._active, self._arrives_coded = False, arrives_coded
        self._others_count = {id(weight): weight for weight in others_count}
        self._samples: WeakKeyDictionary[Quantized, Sample] = WeakKeyDictionary()
        self._counted: list[Sample] = []

    @property
    def active(self) -> bool:
        """Return whether tensors are measured."""
        return self._active

    def start(self, *, active: bool = True) -> None:
        """Forget what was counted, and measure from now on, or not."""
        self._active = active
        self._samples.clear()
        self._counted.clear()

    def sample(self, kind: TensorClass, x: Tensor, codes: Quantized, *, copies: int = 1) -> Sample | None:
        """Measure x, of the shape of its codes but for leading dimensions; None while not active.

        The same codes have the same sample, however many products they go into. copies: the rows that each
        row of x stands for, where it is quantised before it is copied.
        """
        if not self._active:
            return None
        found = self._samples.get(codes)
        if found is None:
            found = _measure(kind, x.detach().reshape(codes.codes.shape), codes, copies=copies)
            self._samples[codes] = found
        return found

    def sample_arrived(self, kind: TensorClass, x: Tensor, codes: Quantized) -> Sample | None:
        """Measure what may have come from another device; None if it came as codes."""
        return None if self._arrives_coded else self.sample(kind, x, codes)

    def sample_swiglu(
        self, gate: Tensor, up: Tensor, row_weights: Tensor | None, codes: Quantized
    ) -> Sample | None:
        """Measure silu(gate) * up [X, I], times the rows' weights [X], which kernels need not write down."""
        if not self._active:
            return None
        product = F.silu(gate.float()) * up.float()
        return self.sample(
            TensorClass.ACTIVATIONS, product if row_weights is None else product * row_weights[:, None], codes
        )

    def count(self, *samples: Sample | None) -> None:
        """Count what was measured, unless that was done."""
        for sample in samples:
            if sample is not None and not sample.counted:
                sample.counted = True
                self._counted.append(sample)

    def see(self, kind: TensorClass, x: Tensor, codes: Quantized, *, copies: int = 1) -> None:
        """Measure x and count it; see `sample`."""
        self.count(self.sample(kind, x, codes, copies=copies))

    def see_weight(self, weight: Tensor, codes: Quantized) -> None:
        """Measure a weight and count it, unless others do."""
        if self._active and id(weight) not in self._others_count:
            self.see(TensorClass.WEIGHTS, weight, codes)

    def totals(self, device: torch.device) -> Totals:
        """Return what was counted since `start`, on a device."""
        classes = list(TensorClass)
        counts = torch.zeros(len(classes), 3, dtype=torch.int64, device=device)
        amax = torch.zeros(len(classes), device=device)
        for sample in self._counted:
            place = classes.index(sample.kind)
            counts[place] += sample.counts_3
            amax[place] = torch.maximum(amax[place], sample.amax)
        return Totals(counts=counts, amax=amax)


def _measure(kind: TensorClass, x: Tensor, codes: Quantized, *, copies: int) -> Sample:
    magnitudes = codes.codes.view(torch.uint8) & _MAGNITUDE
    present = x != 0
    counts_3 = copies * torch.stack(
        [present.sum(), (present & (magnitudes == 0)).sum(), (magnitudes == _LARGEST).sum()]
    )
    if not x.numel():
        return Sample(kind, counts_3, torch.zeros((), device=x.device))
    return Sample(kind, counts_3, x.abs().amax().float().nan_to_num(nan=torch.inf, posinf=torch.inf))
