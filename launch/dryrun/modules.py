"""Which module works now, forwards or backwards.

Forwards, hooks on all modules say so. Backwards no module is called, but a node of autograd's graph carries
the name of the module whose result it made; from that node to the next with a name, that module is meant.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

_KEY = "module"


class WorkingModule:
    """Says the name of the module that works, and whether a backward pass is running.

    Args:
        roots: parts of the model; names are those inside them.
    """

    def __init__(self, roots: Iterable[nn.Module] = ()) -> None:
        self._names: dict[nn.Module, str] = {}
        self._stack: list[str] = []
        self._backward = ""
        self.add(roots)

    def add(self, roots: Iterable[nn.Module]) -> None:
        """Watch more modules."""
        for root in roots:
            self._names |= {module: name for name, module in root.named_modules() if name}

    @property
    def differentiates(self) -> bool:
        """Return whether a backward pass is running."""
        return _node() is not None

    def __call__(self) -> str:
        """Return the name, empty where no module works."""
        if self._stack:
            return self._stack[-1]
        node = _node()
        if node is None:
            return ""
        self._backward = node.metadata.get(_KEY, self._backward)
        return self._backward

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the modules inside."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if module in self._names:
            self._stack.append(self._names[module])

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        if module not in self._names:
            return
        name = self._stack.pop()
        for x in tree_leaves(result):
            node: Any = x.grad_fn if isinstance(x, Tensor) else None
            if node is not None:
                node.metadata[_KEY] = name


def _node() -> Any:
    return torch._C._current_autograd_node()
