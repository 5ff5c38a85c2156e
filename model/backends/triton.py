"""The operations of the FP8 policy by the Triton kernels: for GPUs from sm_90 on.

On a CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set when triton was imported: for tests.

FP8 tensor cores of Hopper read both operands along the dimension that is summed. What is summed along rows is
therefore stored transposed, and a weight is stored in both ways, since its products sum along columns forward
and along rows backward: two bytes of codes for each of its values.

Legend: R rows, C columns; O, D a weight's output and input width; M, N rows of the operands of a product,
K what is summed over; X rows sorted by expert, E experts, I intermediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.fp8 import BLOCK, SQUARE, BlockShape, Quantized
from model.kernels.triton import gemm, grouped_gemm, quantize, swiglu


@dataclass(frozen=True, eq=False)
class BothWays(Quantized):
    """A weight [..., O, D] in 128 × 128 blocks, beside `turned`, its transpose in memory of its own."""

    turned: Quantized

    @property
    def T(self) -> Quantized:  # noqa: N802 (named as torch names it)
        """Return the transposed weight [..., D, O], which nothing has to copy."""
        return self.turned


class TritonKernels:
    """The operations of `Fp8Kernels`; tensors are FP32, BF16 or FP16, and copied if not contiguous."""

    def quantize(self, x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
        """Return x quantised; in 128 × 128 blocks as `BothWays`."""
        if block != SQUARE:
            return quantize.quantize(x.contiguous(), block, power_of_two=power_of_two)
        plain, turned = quantize.quantize_blocks(x.contiguous(), power_of_two=power_of_two)
        return BothWays(plain.codes, plain.scales, SQUARE, power_of_two, turned)

    def quantize_both(self, x_RC: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """Return x in tiles of both directions, from one read."""
        return quantize.quantize_both(x_RC.contiguous(), power_of_two=power_of_two)

    def requantize_columns(self, x_RC: Quantized) -> Quantized:
        """Return the tensor in tiles along its rows."""
        return quantize.requantize_columns(x_RC)

    def dequantize(self, x_RC: Quantized) -> Tensor:
        """Return codes × scales, in three passes over all of the tensor.

        `Quantized.dequantize` goes block by block, which suits a CPU's cache and would be a launch for each.
        """
        scales_RC = x_RC.scales.repeat_interleave(BLOCK, -1)[:, : x_RC.codes.shape[1]]
        return x_RC.codes.float() * scales_RC

    def block_scaled_mm(self, a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
        """Return a bᵀ."""
        return gemm.block_scaled_mm(a_MK, b_NK, dtype=dtype)

    def grouped_block_scaled_mm(
        self, a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return the product of each row with its expert's weight."""
        return grouped_gemm.grouped_block_scaled_mm(a_XK, b_ENK, sizes, dtype=dtype)

    def grouped_block_scaled_outer(
        self, a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
    ) -> Tensor:
        """Return the products that each expert's rows are summed in."""
        return grouped_gemm.grouped_block_scaled_outer(a_XM, b_XN, sizes, dtype=dtype)

    def swiglu_and_quantize(
        self, gate_XI: Tensor, up_XI: Tensor, row_weights_X: Tensor | None, *, power_of_two: bool
    ) -> tuple[Quantized, Quantized, Quantized]:
        """Return the SwiGLU output, gate and up, from one read."""
        if row_weights_X is None:
            row_weights_X = torch.ones(len(gate_XI), device=gate_XI.device)
        inputs = (gate_XI.contiguous(), up_XI.contiguous(), row_weights_X.float().contiguous())
        return swiglu.swiglu_and_quantize(*inputs, power_of_two=power_of_two)
