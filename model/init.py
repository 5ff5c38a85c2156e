"""Initial weights: normal with one standard deviation for every matrix, ones for norms, zeros for the bias.

Each parameter has its own generator, seeded from (seed, name); each expert of a stack from (seed, name,
index). The values are drawn in FP32 on the CPU and then cast, so they depend neither on the storage type, nor
on the device, nor on which part of the model is held here: whole tensors or whole experts are drawn, and
only a share of them is kept.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.experts import Experts
from model.transformer import Transformer


def draw(name: str, shape: tuple[int, ...], *, seed: int, std: float, expert: int | None = None) -> Tensor:
    """Return the initial FP32 value on the CPU of parameter `name`, or of one expert of it.

    shape: of the whole parameter, or of that one expert's slice.
    """
    key = f"{seed}/{name}" if expert is None else f"{seed}/{name}/{expert}"
    generator = torch.Generator("cpu")
    # 63 bits of a cryptographic hash: stable across Python processes, unlike hash()
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


@dataclass(frozen=True)
class Share:
    """The piece of a tensor that is held here: piece `index` of `count` equal ones along `dim`."""

    dim: int = 0
    index: int = 0
    count: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """Return this piece of a whole tensor, a view."""
        return whole.chunk(self.count, self.dim)[self.index]

    def whole_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the tensor of which `shape` is a piece."""
        return tuple(size * self.count if i == self.dim else size for i, size in enumerate(shape))


def all_of_it(name: str) -> Share:
    """Return the share of a model that is whole on this device."""
    return Share()


@torch.no_grad()
def initialize(model: Transformer, *, seed: int, share: Callable[[str], Share] = all_of_it) -> None:
    """Fill every parameter and router bias of `model` in place; `share` tells which piece a parameter is."""
    std = model.config.init_std
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}"
            piece = share(name)
            if isinstance(module, Experts):
                first = piece.index * len(parameter)
                fill_experts(parameter, name, seed=seed, std=std, first_expert=first)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                whole = draw(name, piece.whole_shape(parameter.shape), seed=seed, std=std)
                parameter.copy_(piece.of(whole))
    for router in model.routers().values():
        router.bias.zero_()


def fill_experts(stack_EXX: nn.Parameter, name: str, *, seed: int, std: float, first_expert: int = 0) -> None:
    """Fill a stack of experts in place; `first_expert` is the global index of its first."""
    for offset, expert_XX in enumerate(stack_EXX.data):
        shape = tuple(expert_XX.shape)
        expert_XX.copy_(draw(name, shape, seed=seed, std=std, expert=first_expert + offset))
