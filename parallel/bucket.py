"""Parameters of one storage type, one rule and one reduction, as views of flat tensors.

    flat    compute type   `p.data` is a view of it: what the forward and backward read
    grad    FP32           `p.grad` is a view of it: every backward adds into it, in FP32
    master  FP32           this process's range of the bucket, which the optimizer updates; it IS that range
                           of `flat` where `flat` is FP32

The processes that sum this bucket's gradients own consecutive ranges of equal length; the end is padded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.init import Share
from parallel.groups import Pending
from parallel.mesh import Reduction
from parallel.pieces import Holding, Pieces, pieces_of

_ALIGNMENT = 64
"""Elements to whose multiple every parameter's offset is rounded up: 128 bytes in BF16, so that no view
is worse aligned for GEMM kernels than a tensor of its own. The gaps stay zero and change no norm."""

_NORM_BLOCK = 1 << 16
"""Elements summed in FP32 before the sum of squares goes on in FP64."""


@dataclass(frozen=True)
class ParameterRule:
    """How the optimizer treats a parameter: whether weight decay applies, and the factor on its rate."""

    decay: bool
    lr_multiplier: float


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket's flat tensors, and which piece of the whole parameter it is."""

    name: str
    offset: int
    shape: torch.Size
    share: Share

    @property
    def end(self) -> int:
        """Return the offset behind the parameter's last element."""
        return self.offset + math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """Return the parameter's part of a flat tensor of its bucket, in the parameter's shape."""
        return flat[self.offset : self.end].view(self.shape)

    def stored(self, own: Tensor, first: int) -> Holding:
        """Return what `own`, the bucket's elements from `first` on, holds of the parameter."""
        start, stop = max(self.offset, first), min(self.end, first + own.numel())
        if (start, stop) == (self.offset, self.end) and self.share.count == 1:
            return own[start - first : stop - first].view(self.shape)
        whole = torch.Size(self.share.whole_shape(self.shape))
        if start >= stop:
            return Pieces(whole, own.dtype, ())
        origin = [0] * len(self.shape)
        origin[self.share.dim] = self.share.index * self.shape[self.share.dim]
        return pieces_of(
            own[start - first : stop - first],
            start=start - self.offset,
            local_shape=self.shape,
            origin=tuple(origin),
            global_shape=whole,
        )


@dataclass(frozen=True)
class Bucket:
    """Parameters in flat tensors of equal length (see the module).

    stage: the pipeline stage after whose last backward the gradients are complete; None: after all of them.
    """

    slots: tuple[Slot, ...]
    rule: ParameterRule
    reduction: Reduction
    stage: int | None
    flat: Tensor
    grad: Tensor
    master: Tensor

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters, in the order in which they lie in the bucket."""
        return [slot.name for slot in self.slots]

    @property
    def first(self) -> int:
        """Return the index of the first element that this process owns."""
        return self.reduction.shard.rank * self.master.numel()

    @property
    def own_grad(self) -> Tensor:
        """Return the gradients of the elements that this process owns, a view."""
        return self.grad[self.first : self.first + self.master.numel()]

    @property
    def own_flat(self) -> Tensor:
        """Return the parameters of the elements that this process owns, a view."""
        return self.flat[self.first : self.first + self.master.numel()]

    def start_reduce(self) -> Pending:
        """Begin to sum the gradients over the sharding processes; `finish_reduce` takes the result."""
        return self.reduction.shard.start_reduce_scatter(self.grad)

    def finish_reduce(self, pending: Pending) -> None:
        """Put the summed gradients of the elements owned here in their place; the others are void."""
        total = pending.wait()
        if total is not self.grad:
            self.own_grad.copy_(total)
        self.reduction.replicate.all_reduce(self.own_grad)

    def square_sum(self) -> Tensor:
        """Return this process's share of the sum of squared gradients: replicas count once; FP64 scalar."""
        return _square_sum(self.own_grad) / self.reduction.replicate.size

    def publish(self, start: int = 0, end: int | None = None) -> None:
        """Write the masters' elements [start, end) to the parameters, rounding to their type."""
        if self.master.dtype != self.flat.dtype:
            self.own_flat[start:end].copy_(self.master[start:end])

    def start_gather(self) -> Pending:
        """Begin to fetch the parameters that other processes own."""
        return self.reduction.shard.start_all_gather(self.own_flat, out=self.flat)


@torch.no_grad()
def make_bucket(
    named: list[tuple[str, nn.Parameter, Share]],
    rule: ParameterRule,
    reduction: Reduction,
    stage: int | None,
) -> Bucket:
    """Move parameters into a new bucket; afterwards `data` and `grad` of each are views of it."""
    slots: list[Slot] = []
    length = 0
    for name, parameter, share in named:
        slots.append(Slot(name, length, parameter.shape, share))
        length += _aligned(parameter.numel(), _ALIGNMENT)
    length = _aligned(length, _ALIGNMENT * reduction.shard.size)
    first = named[0][1]
    flat = torch.zeros(length, dtype=first.dtype, device=first.device)
    grad = torch.zeros(length, dtype=torch.float32, device=first.device)
    for slot, (_, parameter, _) in zip(slots, named, strict=True):
        view = slot.view(flat).copy_(parameter.data)
        parameter.data = view  # frees the parameter's own storage before the next one is copied
        parameter.grad_dtype = torch.float32
        parameter.grad = slot.view(grad)
    own_length = length // reduction.shard.size
    own = flat[reduction.shard.rank * own_length : (reduction.shard.rank + 1) * own_length]
    master = own if flat.dtype == torch.float32 else own.float()
    return Bucket(tuple(slots), rule, reduction, stage, flat, grad, master)


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _square_sum(flat: Tensor) -> Tensor:
    """Return the sum of squares as an FP64 scalar; a long FP32 sum alone would lose digits."""
    whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.cat([blocks, rest]).double().square().sum()
