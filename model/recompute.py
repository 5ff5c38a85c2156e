"""Activation recomputation: which tensors the backward pass recomputes rather than finds in memory.

A *region* is a cheap computation, such as a norm, whose outputs are needed again in the backward pass by the
operations that consume them. Under `deepseek` and `core` such a consumer saves a recipe (region, place in its
outputs) where it would save the tensor; the outputs are freed as soon as the forward pass has moved on. The
first consumer that needs one in the backward pass runs the region again, the others share the result, and
the last one frees it. Recipes chain: the input of a region may itself be the output of another.

What is *derived* from a tensor for a consumer, such as its FP8 codes, follows the tensor: derived from an
output of a region it is a recipe as well, derived from any other it is kept.

Nothing else changes: autograd differentiates the same graph, so gradients are bit-identical. What is run
again is the region alone, never a routing decision or the exchange of tokens between devices.

How it works: the region is an attribute of the storage of its outputs, so a view of an output finds it and
nothing has to be looked up or unregistered; `saved_tensors_hooks` swap tensors for recipes. A region is kept
alive only by the storage of its outputs and by the recipes that name it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.config import Recompute

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, Tensor])
Result = TypeVar("Result")


class _Recipe:
    """A saved tensor as a strided window into output `index` of a region."""

    __slots__ = ("index", "offset", "region", "size", "stride")

    def __init__(self, region: "_Region", index: int, tensor: Tensor) -> None:
        self.region, self.index = region, index
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self.region.outputs()[self.index].as_strided(self.size, self.stride, self.offset)


class _Internal:
    """The `index`-th tensor that autograd saved while a core region ran."""

    __slots__ = ("index", "region")

    def __init__(self, region: "_CoreRegion", index: int) -> None:
        self.region, self.index = region, index

    def tensor(self) -> Tensor:
        return self.region.internals()[self.index]


_Packed = Tensor | _Recipe | _Internal


def _pack(tensor: Tensor) -> _Packed:
    """Return the recipe of a region's output, any other tensor without its graph."""
    origin = _origin(tensor)
    if origin is None:
        # an operation may save its own output, whose graph would hold the operation in a circle
        return tensor.detach()
    return _Recipe(*origin, tensor)


def _origin(tensor: Tensor) -> tuple["_Region", int] | None:
    """Return the region that gave this tensor or one that it is a view of, and the place in its outputs."""
    origin: tuple[_Region, int, torch.dtype] | None = getattr(tensor.untyped_storage(), "_region", None)
    return None if origin is None or origin[2] != tensor.dtype else origin[:2]


def _unpack(packed: _Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.tensor()


class _Region:
    """A function and the inputs to run it on again."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs: list[_Packed] = [_pack(tensor) for tensor in inputs]
        self._outputs: tuple[Tensor, ...] | None = None

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the function with the graph of its inputs, and name the region as the origin of its outputs."""
        result = self._function(*inputs)
        own = [tensor.untyped_storage() for tensor in inputs]
        for index, output in enumerate(_as_tuple(result)):
            storage: Any = output.untyped_storage()
            # what the function only hands through, and a storage named already, keep their origin
            is_input = any(storage is each for each in own)  # by identity: a dry run has no addresses
            if not is_input and getattr(storage, "_region", None) is None:
                storage._region = (self, index, output.dtype)
        return result

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs, computed at the first call."""
        if self._outputs is None:
            with torch.no_grad():
                self._outputs = _as_tuple(self._function(*map(_unpack, self._inputs)))
        return self._outputs


class _CoreRegion(_Region):
    """A region that recomputes also what autograd saved inside it."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        super().__init__(function, inputs)
        self._requires_grad = [tensor.requires_grad for tensor in inputs]
        self._internals: list[Tensor] = []
        self._num_internals = 0

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the function, saving recipes for all that its own backward pass needs."""
        with saved_tensors_hooks(self._pack_internal, _unpack):
            return super().run(inputs)

    def _pack_internal(self, tensor: Tensor) -> _Internal:
        self._num_internals += 1
        return _Internal(self, self._num_internals - 1)

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs; the run that computes them collects the internals as well."""
        if self._outputs is None:
            inputs = [_unpack(packed).detach() for packed in self._inputs]
            for tensor, requires_grad in zip(inputs, self._requires_grad, strict=True):
                tensor.requires_grad_(requires_grad)
            collected: list[Tensor] = []
            # the graph of this run is dropped at once; only what it saved is wanted
            with torch.enable_grad(), saved_tensors_hooks(lambda x: collected.append(x.detach()), _unpack):
                outputs = _as_tuple(self._function(*inputs))
            if len(collected) != self._num_internals:
                raise RuntimeError(
                    f"a recomputed region saved {len(collected)} tensors, but {self._num_internals} in the "
                    "forward pass; it must do the same work every time"
                )
            self._internals, self._outputs = collected, tuple(output.detach() for output in outputs)
        return self._outputs

    def internals(self) -> list[Tensor]:
        """Return what autograd saved inside the function, in order."""
        self.outputs()
        return self._internals


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def region(recompute: Recompute, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """Return function(*inputs); under `deepseek` and `core` its outputs are recomputed in the backward pass.

    `function` must be deterministic and take every tensor but parameters as an argument. Its consumers must
    run inside `saving`.
    """
    if recompute not in (Recompute.deepseek, Recompute.core) or not torch.is_grad_enabled():
        return function(*inputs)
    return _Region(function, inputs).run(inputs)


def derived(function: Callable[[Tensor], Outputs], tensor: Tensor) -> Outputs:
    """Return function(tensor); where the backward pass recomputes the tensor, it recomputes this as well.

    `function` must be deterministic and take no other tensor.
    """
    if _origin(tensor) is None:
        return function(tensor)
    return _Region(function, (tensor,)).run((tensor,))


def core_region(recompute: Recompute, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """Return function(*inputs); under `core` its outputs and all that it saved are recomputed."""
    if recompute is not Recompute.core or not torch.is_grad_enabled():
        return function(*inputs)
    return _CoreRegion(function, inputs).run(inputs)


def saving(recompute: Recompute) -> AbstractContextManager[object]:
    """Return the context in which operations save recipes instead of the outputs of regions."""
    if recompute in (Recompute.deepseek, Recompute.core):
        return saved_tensors_hooks(_pack, _unpack)
    return nullcontext()


def run_block(recompute: Recompute, function: Callable[..., Result], *inputs: Tensor) -> Result:
    """Return function(*inputs); under `full` only the inputs are kept and all of it runs again."""
    if recompute is not Recompute.full or not torch.is_grad_enabled():
        return function(*inputs)
    result: Any = checkpoint(function, *inputs, use_reentrant=False)
    return result
