"""Products of block-quantised matrices, emulated fast (arXiv 2412.19437, section 3.3.2).

A tensor core multiplies codes; every 128 elements of the sum its partial result is scaled and added up in
FP32, because the core itself accumulates with some 14 bits:

    out[m, n] = sum over k of  scale_a[m, k] * scale_b[n, k] * sum over 128 j of code_a[m, kj] * code_b[n, kj]

`model.kernels.reference.block_scaled_mm` is that. Here both operands are decoded instead and multiplied once,
with FP32 accumulation, which differs only in the order of summation and in rounding:

* all scales powers of two: code * scale is exact in BF16, and so is a BF16 GEMM up to its summation. Where
  FP32 results are wanted, the same GEMM is reached through FP32 operands that are allowed to be read as BF16;
* otherwise code * scale is rounded to FP32 and the GEMM is an FP32 one.

Legend: M, N rows of the operands, K what is summed over; X rows sorted by group, E groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.backends import mkldnn

from model.kernels.fp8 import Quantized


def block_scaled_mm(a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
    """Return a b^T, [M, N], rounded once to `dtype`."""
    with _reading_as_bf16(_is_exact(a_MK, b_NK)):
        operand = _operand_type(a_MK, b_NK, dtype)
        return (a_MK.dequantize(operand) @ b_NK.dequantize(operand).T).to(dtype)


def grouped_block_scaled_mm(
    a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return a_x b_e^T of each row x and its group e, [X, N]; sizes: rows of each group, in order."""
    with _reading_as_bf16(_is_exact(a_XK, b_ENK)):
        operand = _operand_type(a_XK, b_ENK, dtype)
        groups_MK, weights_ENK = a_XK.dequantize(operand).split(sizes), b_ENK.dequantize(operand)
        out_XN = torch.empty(sum(sizes), weights_ENK.shape[1], dtype=operand, device=weights_ENK.device)
        for group_MK, weight_NK, out_MN in zip(groups_MK, weights_ENK, out_XN.split(sizes), strict=True):
            torch.mm(group_MK, weight_NK.T, out=out_MN)
        return out_XN.to(dtype)


def grouped_block_scaled_outer(
    a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return of each group the sum over its rows of a_x^T b_x, [E, M, N]; groups without rows give zeros.

    Tiles run along the rows, and none may reach from one group into another.
    """
    height = a_XM.block[0]
    if any(end % height for end in accumulate(sizes[:-1])):
        raise ValueError(f"groups of {sizes} rows share tiles of {height} rows; pad each to a multiple")
    with _reading_as_bf16(_is_exact(a_XM, b_XN)):
        operand = _operand_type(a_XM, b_XN, dtype)
        groups = (x.dequantize(operand).split(sizes) for x in (a_XM, b_XN))
        return torch.stack([a_RM.T @ b_RN for a_RM, b_RN in zip(*groups, strict=True)]).to(dtype)


def _is_exact(a: Quantized, b: Quantized) -> bool:
    """Return whether the values of both are exact in BF16."""
    return a.power_of_two and b.power_of_two


def _operand_type(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.dtype:
    """Return the type to decode to: BF16 if it holds both operands and the result."""
    return torch.bfloat16 if _is_exact(a, b) and dtype is torch.bfloat16 else torch.float32


@contextmanager
def _reading_as_bf16(allowed: bool) -> Iterator[None]:
    """Let FP32 GEMMs inside round their operands to BF16, which changes none that is exact in BF16.

    The accumulation and the result stay FP32; no other call of torch's gives those of BF16 operands on a CPU.
    """
    before = mkldnn.matmul.fp32_precision
    if allowed:
        mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before
