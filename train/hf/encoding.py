"""How a tensor of the open weights is written: the type of a weight, and FP8 for the linear maps of blocks.

In FP8 a matrix becomes two tensors, as in the released files (arXiv 2412.19437, section 3.3): `NAME`, its
E4M3 codes, and `NAME_scale_inv`, an FP32 factor for each 128 x 128 block of them, smaller at the edges:

    weight[i, j] = NAME[i, j] * NAME_scale_inv[i // 128, j // 128]

Everything else is written as in BF16. The codes are made of the weights in BF16, not of the FP32 masters,
because that is what a run in BF16 makes its own codes of: with the scales of that run they are the same.

What is read back and written again has the same values, and with FP32 scales the same codes and scales. Take
a block whose largest magnitude, a BF16 number, is a, and its scale s = a / 448 (1 + e), |e| <= 2^-24. Its
largest code is 448 and decodes to 448 s, so near to a that BF16 rounds it to a: the new scale is s. Any other
code c decodes to c s (1 + d), |d| <= 2^-8, while half-way to the next code is 2^-5 away at the least: the new
code is c. (A block that lies below 2^-126 has scale 2^-117, and all its codes may be zero: its scale is 1 the
second time.) A power of two may be halved, and its codes doubled, where the largest code is 224: no value
changes. Scales of other tools, made of a number that is not BF16, change by at most 2^-8 and leave the codes.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

import torch
from torch import Tensor

from model.config import Fp8Scales
from model.hf import HfTensor, Role
from model.kernels.fp8 import BLOCK, SQUARE, quantize

SCALE_SUFFIX = "_scale_inv"


class ExportType(StrEnum):
    """The type weights are written in."""

    BF16 = "bf16"
    FP32 = "fp32"
    FP8 = "fp8"
    """FP8 for the linear maps of blocks, BF16 for the rest."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The types of the tensors of one export.

    fp8_scales: of the weights' blocks; used where the type is FP8.
    """

    type: ExportType
    fp8_scales: Fp8Scales = Fp8Scales.deepseek

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of weights that are not FP8."""
        return torch.float32 if self.type is ExportType.FP32 else torch.bfloat16

    @property
    def fp8(self) -> bool:
        """Return whether linear maps are FP8."""
        return self.type is ExportType.FP8

    def names(self, tensor: HfTensor) -> list[str]:
        """Return the names under which a tensor is written: its own, and that of its scales."""
        return [tensor.name, tensor.name + SCALE_SUFFIX] if self._is_fp8(tensor) else [tensor.name]

    def num_bytes(self, tensor: HfTensor) -> int:
        """Return the bytes that a tensor is written in, scales included."""
        if self._is_fp8(tensor):
            num_blocks = prod(-(-size // BLOCK) for size in tensor.shape)
            return prod(tensor.shape) + num_blocks * torch.float32.itemsize
        return prod(tensor.shape) * self._dtype_of(tensor).itemsize

    def encode(self, tensor: HfTensor, values: Tensor) -> dict[str, Tensor]:
        """Return what is written for `values`, FP32 of the tensor's shape, by name; no memory is shared."""
        written = values.to(self._dtype_of(tensor), copy=True).contiguous()
        if not self._is_fp8(tensor):
            return {tensor.name: written}
        power_of_two = self.fp8_scales is Fp8Scales.power_of_two
        blocks = quantize(written, SQUARE, power_of_two=power_of_two)
        return dict(zip(self.names(tensor), (blocks.codes, blocks.scales), strict=True))

    def _is_fp8(self, tensor: HfTensor) -> bool:
        return self.fp8 and tensor.role is Role.LINEAR

    def _dtype_of(self, tensor: HfTensor) -> torch.dtype:
        """Return a tensor's type where it is not FP8: router biases are FP32 whatever the weights are."""
        return torch.float32 if tensor.role is Role.ROUTER_BIAS else self.dtype
