"""Block-scaled FP8 matrix products in Triton (arXiv 2412.19437, section 3.3.2).

All three products of a linear layer have the form a [M, K] · b [N, K]ᵀ, summed along the last dimension of
both, the only one along which Hopper's FP8 tensor cores read (quantize.py says what is kept transposed):

    product           a                       b                   scales of b
    forward           x   [R, D] row tiles    w   [O, D] blocks   one for each 128×128 values
    input gradient    dy  [R, O] row tiles    wᵀ  [D, O] blocks   one for each 128×128 values
    weight gradient   dyᵀ [O, R] row tiles    xᵀ  [D, R] tiles    one for each row and 128 of K

Tensor cores of Hopper add FP8 products with about 14 bits. So each 128 of K, which is also where scales
change, is summed there from zero; the sum is multiplied by its scales and added in FP32 registers:

    out[m, n] = Σ_k s_a[m, k] s_b[n, k] Σ_{j in tile k} a[m, j] b[n, j]

Two FP32 tiles are alive at that moment, which is what limits the tile: at 128×128 over 8 warps they take 128
of a thread's 255 registers. A scale for each column takes more, and the weight gradient's tile is smaller.
`BLOCK_SCALES` and `ROW_SCALES` hold only what compiles for sm_90 and sm_100 without spilling a register.

Legend: M, N rows of the operands, K what is summed over.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import BLOCK, ROW_TILE, SQUARE, BlockShape, Quantized
from model.kernels.triton.quantize import INTERPRETED

BLOCK_SCALES = (
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=4),
)
"""Tiles where b has one scale for 128×128 values; BLOCK_N divides 128."""
ROW_SCALES = (
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=4),
)
"""Tiles where b has one scale for each row and 128 of K."""

BAND = tl.constexpr(8)
"""Rows of tiles that programs walk through column by column, so that they meet in the second-level cache."""
_TILE = tl.constexpr(BLOCK)


@triton.jit
def tile_of_program(
    M: tl.tensor, N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the (row, column) of this program's tile: bands of BAND rows, each column by column."""
    program = tl.program_id(0)
    num_i, num_j = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (BAND * num_j)
    height = tl.minimum(num_i - band * BAND, BAND)
    within = program % (BAND * num_j)
    return band * BAND + within % height, within // height


@triton.jit
def scaled_product(
    acc: tl.tensor,
    a_ptr: tl.tensor,
    a_scales_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scales_ptr: tl.tensor,
    a_row: tl.tensor,
    b_row: tl.tensor,
    K: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    b_block: tl.tensor,
    B_BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Add to acc [BLOCK_M, BLOCK_N] what tiles first .. last - 1 of K of these rows of a and b give.

    Rows must exist: clamp those outside, and do not store what they give.
    """
    tiles = tl.cdiv(K, _TILE)
    a_base = a_ptr + a_row.to(tl.int64)[:, None] * K
    b_base = b_ptr + b_row.to(tl.int64)[None, :] * K
    a_scale_base = a_scales_ptr + a_row.to(tl.int64) * tiles
    if B_BLOCKS:
        b_scale_base = b_scales_ptr + b_block.to(tl.int64) * tiles
    else:
        b_scale_base = b_scales_ptr + b_row.to(tl.int64) * tiles
    for tile in range(first, last):  # type: ignore[arg-type]
        depth = tile * _TILE + tl.arange(0, _TILE)
        a = tl.load(a_base + depth[None, :], mask=depth[None, :] < K, other=0.0)
        b = tl.load(b_base + depth[:, None], mask=depth[:, None] < K, other=0.0)
        a_scale = tl.load(a_scale_base + tile)
        b_scale = tl.load(b_scale_base + tile)
        if B_BLOCKS:
            acc += tl.dot(a, b) * (a_scale * b_scale)[:, None]
        else:
            acc += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    return acc


@triton.jit
def gemm_kernel(
    a_ptr: tl.tensor,
    a_scales_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    B_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write one tile of a bᵀ; B_BLOCKS: b has one scale for each 128×128 values."""
    i, j = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = scaled_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        a_ptr,
        a_scales_ptr,
        b_ptr,
        b_scales_ptr,
        tl.minimum(row, M - 1),
        tl.minimum(column, N - 1),
        K,
        0,  # type: ignore[arg-type]
        tl.cdiv(K, _TILE),
        j * BLOCK_N // _TILE,
        B_BLOCKS,
    )
    store_tile(out_ptr, acc, row, column, M, N)


@triton.jit
def store_tile(
    out_ptr: tl.tensor, acc: tl.tensor, row: tl.tensor, column: tl.tensor, end: tl.tensor, N: tl.tensor
) -> None:
    """Store a tile of [.., N] in the type of `out`, rows below `end` only."""
    inside = (row < end)[:, None] & (column < N)[None, :]
    address = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(address, acc, mask=inside)


def block_scaled_mm(a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype) -> Tensor:
    """Return a bᵀ, [M, N], rounded once to `dtype`.

    a has 1×128 tiles, b 1×128 tiles or 128×128 blocks; raises ValueError for others. Operands that are views
    of the transpose are copied first; those of quantize.py whose transpose is read are stored transposed.
    """
    a, b = k_major(a_MK, (ROW_TILE,)), k_major(b_NK, (ROW_TILE, SQUARE))
    (M, K), N = a.codes.shape, len(b.codes)
    out_MN = a.codes.new_empty(M, N, dtype=stored_type(dtype))
    blocks = b.block == SQUARE
    kernel, configs = (_by_blocks, BLOCK_SCALES) if blocks else (_by_rows, ROW_SCALES)
    if M and N:
        tensors = (a.codes, a.scales, b.codes, b.scales, out_MN)
        launch(kernel, configs, num_tiles(M, N), *tensors, M, N, K, blocks)
    return out_MN.to(dtype)


def k_major(x: Quantized, blocks: Sequence[BlockShape]) -> Quantized:
    """Return x in memory whose last dimension is the one that is summed; its block must be one of these."""
    if x.block not in blocks:
        raise ValueError(f"blocks of {x.block} values; this product reads {' or '.join(map(str, blocks))}")
    return Quantized(x.codes.contiguous(), x.scales.contiguous(), x.block, x.power_of_two)


def stored_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a kernel stores: the interpreter, whose casts round wrongly, stores FP32."""
    return torch.float32 if INTERPRETED else dtype


def num_tiles(M: int, N: int, *matrices: int) -> Any:
    """Return the grid of a product [M, N], or of several, which depends on the configuration's tile."""
    return lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]), *matrices)


def launch(kernel: Any, configs: Sequence[triton.Config], grid: Any, *arguments: Tensor | int | bool) -> None:
    """Run an autotuned kernel; in the interpreter, where nothing can be timed, its first configuration."""
    if INTERPRETED:
        kernel.fn[grid](*arguments, **configs[0].kwargs)
    else:
        # one instruction, and one rounding, for each product and sum of the promotion
        kernel[grid](*arguments, enable_fp_fusion=True)


_by_blocks = triton.autotune(list(BLOCK_SCALES), key=["M", "N", "K"])(gemm_kernel)
_by_rows = triton.autotune(list(ROW_SCALES), key=["M", "N", "K"])(gemm_kernel)
