"""The operations that DeepSeek-V3's FP8 policy is made of, and their plain version.

The policy (model/fp8.py) decides what is FP8, with which scales, and what is kept; `Fp8Kernels` is all that
it asks of whoever computes. `ReferenceKernels` emulates in plain torch, on any device; the Triton kernels are
in model/backends/triton.py. Both give the same codes and scales.

Legend: R rows, C columns; M, N rows of the operands of a product, K what is summed over; X rows sorted by
expert, E experts, I intermediate.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import fp8, fp8_gemm
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, BlockShape, Quantized


class Fp8Kernels(Protocol):
    """Quantisation, and products of what was quantised."""

    def quantize(self, x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
        """Return x with one scale for each block: [R, C], or with 128 × 128 blocks also a stack [E, R, C]."""
        ...

    def quantize_both(self, x_RC: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """Return x in 1 × 128 and in 128 × 1 tiles."""
        ...

    def requantize_columns(self, x_RC: Quantized) -> Quantized:
        """Return what is kept in 1 × 128 tiles in 128 × 1 tiles, from its codes alone."""
        ...

    def dequantize(self, x_RC: Quantized) -> Tensor:
        """Return codes × scales of 1 × 128 tiles, FP32."""
        ...

    def block_scaled_mm(self, a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
        """Return a bᵀ, [M, N], rounded once to `dtype`."""
        ...

    def grouped_block_scaled_mm(
        self, a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return a_x b_eᵀ of each row x and its expert e, [X, N]; sizes: rows of each expert, in order."""
        ...

    def grouped_block_scaled_outer(
        self, a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return of each expert the sum over its rows of a_xᵀ b_x, [E, M, N]; zeros of one without rows."""
        ...

    def swiglu_and_quantize(
        self, gate_XI: Tensor, up_XI: Tensor, row_weights_X: Tensor | None, *, power_of_two: bool
    ) -> tuple[Quantized, Quantized, Quantized]:
        """Return silu(gate) · up (times each row's weight, if given), gate, and up, in 1 × 128 tiles."""
        ...


class ReferenceKernels:
    """The operations in plain torch; products are those of decoded operands (model/kernels/fp8_gemm.py)."""

    def quantize(self, x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
        """Return x quantised."""
        return fp8.quantize(x, block, power_of_two=power_of_two)

    def quantize_both(self, x_RC: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """Return x in tiles of both directions."""
        rows, columns = (
            fp8.quantize(x_RC, tile, power_of_two=power_of_two) for tile in (ROW_TILE, COLUMN_TILE)
        )
        return rows, columns

    def requantize_columns(self, x_RC: Quantized) -> Quantized:
        """Return the tensor in tiles along its rows."""
        return fp8.requantize(x_RC, COLUMN_TILE)

    def dequantize(self, x_RC: Quantized) -> Tensor:
        """Return codes × scales."""
        return x_RC.dequantize()

    def block_scaled_mm(self, a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
        """Return a bᵀ."""
        return fp8_gemm.block_scaled_mm(a_MK, b_NK, dtype=dtype)

    def grouped_block_scaled_mm(
        self, a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return the product of each row with its expert's weight."""
        return fp8_gemm.grouped_block_scaled_mm(a_XK, b_ENK, sizes, dtype=dtype)

    def grouped_block_scaled_outer(
        self, a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return the products that each expert's rows are summed in."""
        return fp8_gemm.grouped_block_scaled_outer(a_XM, b_XN, sizes, dtype=dtype)

    def swiglu_and_quantize(
        self, gate_XI: Tensor, up_XI: Tensor, row_weights_X: Tensor | None, *, power_of_two: bool
    ) -> tuple[Quantized, Quantized, Quantized]:
        """Return the SwiGLU output, from FP32 straight to codes, gate and up."""
        hidden_XI = F.silu(gate_XI.float()) * up_XI.float()
        if row_weights_X is not None:
            hidden_XI = hidden_XI * row_weights_X[:, None]
        hidden, gate, up = (
            fp8.quantize(x_XI, ROW_TILE, power_of_two=power_of_two) for x_XI in (hidden_XI, gate_XI, up_XI)
        )
        return hidden, gate, up


REFERENCE = ReferenceKernels()
"""It has no state: one is enough."""
