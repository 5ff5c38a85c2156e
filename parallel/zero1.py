"""ZeRO stage 1 (arXiv 1910.02054) on flat buffers: the storage behind a model's parameters.

Parameters that share a storage type and an update rule live in one `Bucket` of three flat tensors:

    flat    compute type   `p.data` is a view of it: what the forward and backward read
    grad    FP32           `p.grad` is a view of it: every backward adds into it, in FP32
    master  FP32           what the optimizer updates; it IS `flat` where `flat` is FP32

One optimizer step is always the same sequence, bucket by bucket: gradients are summed into `grad`, their
norm is taken once over all buckets, the optimizer updates `master`, and `publish` writes `flat`. This is
the sequence for one process, whose shard of each bucket is the whole bucket.

Autograd writes FP32 gradients of BF16 parameters because `p.grad_dtype` says so, and accumulates in place
because `p.grad` exists. Both hold for backward passes of any kind (also split ones), where gradient hooks
do not fire. Hence `p.grad` must never be set to None: use `Zero1.zero_grad`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """Where a parameter lies in its bucket's flat tensors."""

    name: str
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """Return the parameter's part of a flat tensor of its bucket, in the parameter's shape."""
        return flat[self.offset : self.offset + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one storage type and one rule, in flat tensors of equal length (see the module)."""

    slots: tuple[Slot, ...]
    rule: ParameterRule
    flat: Tensor
    grad: Tensor
    master: Tensor

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters, in the order in which they lie in the bucket."""
        return [slot.name for slot in self.slots]

    def publish(self, start: int = 0, end: int | None = None) -> None:
        """Write the masters' elements [start, end) to `flat`, rounding to its type."""
        if self.flat is not self.master:
            self.flat[start:end].copy_(self.master[start:end])


class Zero1:
    """Moves parameters into flat buckets and keeps their FP32 gradients and masters.

    Args:
        named_parameters: name and parameter, each parameter once. Their values are kept; afterwards
            `data` and `grad` of each are views of its bucket.
        rule: chooses the update rule of a parameter, and with it the bucket.

    Raises:
        ValueError: if a parameter is given under two names, because it would be updated twice.
    """

    buckets: list[Bucket]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        rule: Callable[[str, nn.Parameter], ParameterRule],
    ) -> None:
        members: dict[tuple[torch.dtype, ParameterRule], list[tuple[str, nn.Parameter]]] = {}
        seen: dict[int, str] = {}
        for name, parameter in named_parameters:
            first = seen.setdefault(id(parameter), name)
            if first != name:
                raise ValueError(f"parameters {first} and {name} are one tensor; give it under one name")
            members.setdefault((parameter.dtype, rule(name, parameter)), []).append((name, parameter))
        self.buckets = [_fill_bucket(named, key[1]) for key, named in members.items()]

    def zero_grad(self) -> None:
        """Set all gradients to zero in place."""
        for bucket in self.buckets:
            bucket.grad.zero_()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the L2 norm of all gradients together: FP32 scalar, on the buckets' device.

        Not finite if any gradient is not finite.
        """
        return torch.stack([_square_sum(bucket.grad) for bucket in self.buckets]).sum().sqrt().float()

    @torch.no_grad()
    def scale_grad(self, factor: Tensor | float) -> None:
        """Multiply all gradients by a factor."""
        for bucket in self.buckets:
            bucket.grad.mul_(factor)

    @torch.no_grad()
    def publish(self) -> None:
        """Write every master to the parameter the model computes with."""
        for bucket in self.buckets:
            bucket.publish()

    def named_views(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """Return, by parameter name, the views of per-bucket flat tensors in the parameters' shapes."""
        return {
            slot.name: slot.view(flat)
            for bucket, flat in zip(self.buckets, flats, strict=True)
            for slot in bucket.slots
        }


@torch.no_grad()
def _fill_bucket(named: list[tuple[str, nn.Parameter]], rule: ParameterRule) -> Bucket:
    slots: list[Slot] = []
    length = 0
    for name, parameter in named:
        slots.append(Slot(name, length, parameter.shape))
        length += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    first = named[0][1]
    flat = torch.zeros(length, dtype=first.dtype, device=first.device)
    grad = torch.zeros(length, dtype=torch.float32, device=first.device)
    for slot, (_, parameter) in zip(slots, named, strict=True):
        view = slot.view(flat).copy_(parameter.data)
        parameter.data = view  # frees the parameter's own storage before the next one is copied
        parameter.grad_dtype = torch.float32
        parameter.grad = slot.view(grad)
    master = flat if flat.dtype == torch.float32 else flat.float()
    return Bucket(tuple(slots), rule, flat, grad, master)


def _square_sum(flat: Tensor) -> Tensor:
    """Return the sum of squares as an FP64 scalar; a long FP32 sum alone would lose digits."""
    whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return torch.cat([blocks, rest]).double().square().sum()
