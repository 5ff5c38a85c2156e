"""Products of block-quantised matrices, emulated fast (arXiv 2412.19437, section 3.3.2).

A tensor core multiplies codes; every 128 elements of the sum its partial result is scaled and added up in
FP32, because the core itself accumulates with some 14 bits:

    out[m, n] = sum over k of  scale_a[m, k] * scale_b[n, k] * sum over 128 j of code_a[m, kj] * code_b[n, kj]

`model.kernels.reference.block_scaled_mm` is that. Here both operands are decoded instead and multiplied once,
with FP32 accumulation, which differs only in the order of summation and in rounding:

* BF16 results of operands whose scales are all powers of two: code * scale is exact in BF16, so a BF16 GEMM
  loses nothing but the rounding of its result;
* FP32 results of such operands, above all weight gradients: the operands are written in FP32, because torch
  has no CPU GEMM of BF16 operands with FP32 results, and the GEMM may round them, which changes nothing;
* otherwise code * scale is rounded to FP32 and the GEMM is an FP32 one.

Legend: M, N rows of the operands, K what is summed over; X rows sorted by group, R of one group, E groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.kernels.fp8 import Quantized


def block_scaled_mm(a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
    """Return a b^T, [M, N], rounded once to `dtype`."""
    operand = _operand_type(a_MK, b_NK, dtype)
    a, b = a_MK.dequantize(operand), b_NK.dequantize(operand)
    with _bf16_units(exact=_is_exact(a_MK, b_NK)):
        return (a @ b.T).to(dtype)


def grouped_block_scaled_mm(
    a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return a_x b_e^T of each row x and its group e, [X, N]; sizes: rows of each group, in order."""
    operand = _operand_type(a_XK, b_ENK, dtype)
    groups_MK, weights_ENK = a_XK.dequantize(operand).split(sizes), b_ENK.dequantize(operand)
    out_XN = torch.empty(sum(sizes), weights_ENK.shape[1], dtype=operand, device=weights_ENK.device)
    with _bf16_units(exact=_is_exact(a_XK, b_ENK)):
        for group_MK, weight_NK, out_MN in zip(groups_MK, weights_ENK, out_XN.split(sizes), strict=True):
            torch.mm(group_MK, weight_NK.T, out=out_MN)
    return out_XN.to(dtype)


def grouped_block_scaled_outer(
    a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return of each group the sum over its rows of a_x^T b_x, [E, M, N]; groups without rows give zeros.

    Tiles run along the rows; ValueError if one reaches from one group into the next.
    """
    height = a_XM.block[0]
    if any(end % height for end in accumulate(sizes[:-1])):
        raise ValueError(f"groups of {sizes} rows share tiles of {height} rows; pad each to a multiple")
    operand = _operand_type(a_XM, b_XN, dtype)
    groups = [x.dequantize(operand).split(sizes) for x in (a_XM, b_XN)]
    with _bf16_units(exact=_is_exact(a_XM, b_XN)):
        return torch.stack([a_RM.T @ b_RN for a_RM, b_RN in zip(*groups, strict=True)]).to(dtype)


def _is_exact(a: Quantized, b: Quantized) -> bool:
    """Return whether BF16 holds both operands: E4M3 numbers times powers of two."""
    return a.power_of_two and b.power_of_two


def _operand_type(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.dtype:
    """Return the type to decode to: BF16 if it holds both operands and the result."""
    return torch.bfloat16 if _is_exact(a, b) and dtype is torch.bfloat16 else torch.float32


@contextmanager
def _bf16_units(*, exact: bool) -> Iterator[None]:
    """Let FP32 products on a CPU round their operands to BF16, if that is exact; sums stay FP32."""
    backend: Any = torch.backends.mkldnn  # whose types lack `matmul`
    matmul = backend.matmul
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
