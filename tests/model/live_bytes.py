"""How many bytes of the tensors made in a forward pass are still held after it."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Remembers, without holding them, the storages of all tensors that operations return inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._made.setdefault(reference.cdata, (reference, storage.nbytes()))
        return result

    def forget(self, *tensors: Tensor) -> None:
        """Leave out tensors that exist anyway: inputs, parameters, outputs."""
        for tensor in tensors:
            self._made.pop(StorageWeakRef(tensor.untyped_storage()).cdata, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of the remembered storages that something still holds."""
        return sum(nbytes for reference, nbytes in self._made.values() if not reference.expired())


def held_bytes(model: torch.nn.Module, *inputs: Tensor) -> int:
    """Return the bytes that the graph of model(*inputs) holds beyond parameters, inputs and outputs."""
    with LiveBytes() as live:
        output = model(*inputs)
    live.forget(*inputs, *model.parameters(), *model.buffers())
    live.forget(*(leaf for leaf in tree_leaves(vars(output)) if isinstance(leaf, Tensor)))
    return live.num_bytes
