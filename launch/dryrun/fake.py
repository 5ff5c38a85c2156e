"""Tensors with shapes and no memory, and whoever watches what is done with them.

Inside a `DryMode` every tensor has a shape, a type and a storage of a known size, but no values: torch's
FakeTensorMode, with three additions.

- What the host reads of a tensor has an answer: a number is 1, a truth is true. So losses and gradient norms
  are finite, and a step goes through. (Counts of routed rows get better answers: launch/dryrun/routing.py.)
- Observers hear of every operation that the code calls, not of those that one is made of.
- Tensors say that they are on the CPU, so the code runs as it does there, and the kernels' plain versions
  decide what is saved for the backward pass. `wide_tiles` lets these take large pieces: they cut their work
  to fit a CPU's cache, which does not matter here, and each piece costs time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from model.kernels import blocks, cross_entropy, fp8
from train import adamw

Observer = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Called after an operation with the operation, its arguments and what it returned."""

TILES: tuple[tuple[ModuleType, str, int], ...] = (
    (blocks, "BLOCK_ELEMENTS", 1 << 24),
    (fp8, "CHUNK_ELEMENTS", 1 << 24),
    (cross_entropy, "SOFTMAX_ELEMENTS", 1 << 26),
    (cross_entropy, "ACCUMULATE_ROWS", 1 << 15),
    (adamw, "CPU_CHUNK", 1 << 24),
)
"""Elements, or rows, of a piece. Scratch of such pieces is at most 256 MiB."""

_READ = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_aten = torch.ops.aten
_IN_PLACE = frozenset(
    getattr(packet, overload)
    for packet in (
        *(_aten.add_, _aten.sub_, _aten.mul_, _aten.div_, _aten.copy_, _aten.masked_fill_, _aten.fill_),
        *(_aten.zero_, _aten.exp_, _aten.square_, _aten.rsqrt_, _aten.reciprocal_, _aten.scatter_add_),
        *(_aten.index_add_, _aten.index_put_, _aten.baddbmm_, _aten.addmv_),
    )
    for overload in packet.overloads()
)
_INTO_OUT = frozenset(
    (_aten.mm.out, _aten.addmm.out, _aten.bmm.out, _aten.silu.out, _aten.mul.out, _aten.sub.out)
)


class DryMode(FakeTensorMode):
    """The mode: `with DryMode(observers): ...`."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        super().__init__()
        self._observers = tuple(observers)
        self._depth = 0

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        """Do one operation on shapes alone, and tell the observers."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked so often that the usual way would take a third of the time
        if func is _READ:
            return _answer(args[0])
        result = _written(func, args, kwargs or {})
        if result is None:
            self._depth += 1
            try:
                result = super().dispatch(func, types, args, kwargs)
            finally:
                self._depth -= 1
        if not self._depth:
            for observer in self._observers:
                observer(func, tuple(args), kwargs or {}, result)
        return result


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the tensor into which an operation writes values alone, None for any other operation.

    Its shape stays what it was, so nothing has to be worked out. These are half of all operations.
    """
    written = kwargs.get("out") if func in _INTO_OUT else args[0] if func in _IN_PLACE else None
    plain = isinstance(written, FakeTensor) and written.constant is None
    return written if plain else None


def _answer(x: Any) -> bool | int | float:
    """Return what the host reads of a tensor of one element."""
    known: Tensor | None = getattr(x, "constant", None)
    if known is not None:
        return known.item()
    if x.dtype == torch.bool:
        return True
    return 1.0 if x.dtype.is_floating_point else 1


@contextmanager
def wide_tiles() -> Iterator[None]:
    """Let the CPU's kernels, and the optimizer, take large pieces inside."""
    before = [getattr(module, name) for module, name, _ in TILES]
    for module, name, size in TILES:
        setattr(module, name, size)
    try:
        yield
    finally:
        for (module, name, _), size in zip(TILES, before, strict=True):
            setattr(module, name, size)
