"""FP8 quantisation in Triton: 1×128 tiles, tiles of the transpose, 128×128 blocks (arXiv 2412.19437, 3.3.2).

A tile shares one FP32 scale, amax / 448, or that rounded up to a power of two; its codes are the values
divided by the scale and rounded to E4M3. Two details decide whether codes equal the plain reference's:

* Division is IEEE (`div_rn`). Triton's `/` is two units off at worst, a product with 1 / scale one: both move
  values across the midpoint of two codes.
* The amax is the largest magnitude as an INTEGER. The bits of non-negative floats are ordered as the floats
  are, with infinity above all numbers and NaN above infinity, so a NaN reaches its tile's scale.

FP8 tensor cores of Hopper read both operands along the summed dimension only. A weight gradient sums over
tokens, so it needs activations quantised along tokens and stored transposed; an input gradient sums over
outputs and needs the weight transposed. Both come out of the same read as the plain codes.

    forward          y  [R, O] = x  [R, D] · w  [O, D]     tiles along D, blocks
    input gradient   dx [R, D] = dy [R, O] · wᵀ [D, O]     tiles along O, blocks
    weight gradient  dw [O, D] = dyᵀ[O, R] · xᵀ [D, R]     tiles along R on both sides

Kernels run on CUDA tensors, or on CPU tensors where TRITON_INTERPRET=1 was set before the import. Tensors are
contiguous.

Legend: R rows, D width, E matrices of a stack. In kernels: N rows and W columns of the 128×128 square of one
program, row and column their numbers, (i, j) the square's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model.kernels.fp8 import (
    BLOCK,
    COLUMN_TILE,
    LARGEST_CODE,
    ROW_TILE,
    SMALLEST_SCALE,
    SQUARE,
    BlockShape,
    Quantized,
)

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, whose own cast to FP8 rounds wrongly."""
WARPS = 16
"""Of one program: a thread holds 32 values of its square."""

_TILE = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(LARGEST_CODE)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def scale_of(x: tl.tensor, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Return the scales of the tiles that lie along an axis of x, FP32."""
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    amax = tl.cast(amax_bits, tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, _LARGEST), _SMALLEST_SCALE)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & _INFINITY_BITS).to(tl.float32, bitcast=True)
    return tl.where(amax_bits == 0, 1.0, tl.where(amax_bits < _INFINITY_BITS, scale, float("nan")))


@triton.jit
def to_e4m3(x: tl.tensor, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return FP32 values as E4M3: to nearest, ties to even, saturating at 448.

    Hardware has an instruction for it. The integer arithmetic below does the same for the interpreter.
    """
    if not INTERPRET:
        return x.to(tl.float8e4nv)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # add half of the 20 bits that go (one less where the last kept bit is 0), then move the exponent's bias
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2^-6 codes count multiples of 2^-9, which is the last bit of an FP32 number in [2^14, 2^15)
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def encode(x: tl.tensor, scale: tl.tensor, POWER_OF_TWO: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return the codes of x / scale, whose quotients are exactly rounded."""
    if POWER_OF_TWO:
        # the inverse of a power of two is exact, and so the product with it is the quotient
        return to_e4m3(x * tl.div_rn(1.0, scale), INTERPRET)
    return to_e4m3(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), INTERPRET)


@triton.jit
def store_row_tiles(
    x_NW: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    R: tl.tensor,
    D: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise each row of x, FP32 with zeros outside, and store it as tile `tile` of its row of [R, D]."""
    columns = tile * _TILE + tl.arange(0, _TILE)
    scale = scale_of(x_NW, tl.constexpr(1), POWER_OF_TWO)
    codes = encode(x_NW, scale[:, None], POWER_OF_TWO, INTERPRET)
    inside = (row < R)[:, None] & (columns < D)[None, :]
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * D + columns[None, :], codes, mask=inside)
    tl.store(scales_ptr + row.to(tl.int64) * tl.cdiv(D, _TILE) + tile, scale, mask=row < R)


@triton.jit
def store_column_tiles(
    x_NW: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    column: tl.tensor,
    tile: tl.tensor,
    R: tl.tensor,
    D: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise each column of x and store it as tile `tile` of its row of the transpose [D, R]."""
    rows = tile * _TILE + tl.arange(0, _TILE)
    scale = scale_of(x_NW, tl.constexpr(0), POWER_OF_TWO)
    codes = encode(x_NW, scale[None, :], POWER_OF_TWO, INTERPRET)
    inside = (column < D)[:, None] & (rows < R)[None, :]
    tl.store(codes_ptr + column.to(tl.int64)[:, None] * R + rows[None, :], tl.trans(codes), mask=inside)
    tl.store(scales_ptr + column.to(tl.int64) * tl.cdiv(R, _TILE) + tile, scale, mask=column < D)


@triton.jit
def load_square(
    x_ptr: tl.tensor, i: tl.tensor, j: tl.tensor, R: tl.tensor, D: tl.tensor, HEIGHT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return square (i, j), HEIGHT × 128, of x [R, D]: FP32, zero outside; and its row and column numbers."""
    row = i * HEIGHT + tl.arange(0, HEIGHT)
    column = j * _TILE + tl.arange(0, _TILE)
    inside = (row < R)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32), row, column


@triton.jit
def tiles_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_t_ptr: tl.tensor,
    scales_t_ptr: tl.tensor,
    R: tl.tensor,
    D: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise one square of x [R, D] by rows, by columns, or both; one program a square."""
    i, j = tl.program_id(0), tl.program_id(1)
    x_NW, row, column = load_square(x_ptr, i, j, R, D, _TILE)
    if ROWS:
        store_row_tiles(x_NW, codes_ptr, scales_ptr, row, j, R, D, POWER_OF_TWO, INTERPRET)
    if COLUMNS:
        store_column_tiles(x_NW, codes_t_ptr, scales_t_ptr, column, i, R, D, POWER_OF_TWO, INTERPRET)


@triton.jit
def requantize_kernel(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_t_ptr: tl.tensor,
    scales_t_ptr: tl.tensor,
    R: tl.tensor,
    D: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Decode one square of row tiles and quantise it by columns."""
    i, j = tl.program_id(0), tl.program_id(1)
    codes_NW, row, column = load_square(codes_ptr, i, j, R, D, _TILE)
    scale_N = tl.load(scales_ptr + row.to(tl.int64) * tl.cdiv(D, _TILE) + j, mask=row < R, other=0.0)
    x_NW = codes_NW * scale_N[:, None]
    store_column_tiles(x_NW, codes_t_ptr, scales_t_ptr, column, i, R, D, POWER_OF_TWO, INTERPRET)


@triton.jit
def blocks_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_t_ptr: tl.tensor,
    scales_t_ptr: tl.tensor,
    R: tl.tensor,
    D: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise one square with one scale; store it as it is and transposed. Dimension 2 counts matrices."""
    i, j, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_i, num_j = tl.cdiv(R, _TILE), tl.cdiv(D, _TILE)
    first = matrix * R * D
    x_NW, row, column = load_square(x_ptr + first, i, j, R, D, _TILE)
    scale = scale_of(tl.ravel(x_NW), tl.constexpr(0), POWER_OF_TWO)
    codes = encode(x_NW, scale, POWER_OF_TWO, INTERPRET)
    inside = (row < R)[:, None] & (column < D)[None, :]
    tl.store(codes_ptr + first + row.to(tl.int64)[:, None] * D + column[None, :], codes, mask=inside)
    inside_t = (column < D)[:, None] & (row < R)[None, :]
    transposed = column.to(tl.int64)[:, None] * R + row[None, :]
    tl.store(codes_t_ptr + first + transposed, tl.trans(codes), mask=inside_t)
    tl.store(scales_ptr + (matrix * num_i + i) * num_j + j, scale)
    tl.store(scales_t_ptr + (matrix * num_j + j) * num_i + i, scale)


def quantize(x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
    """Return x, FP32, BF16 or FP16, as `model.kernels.fp8.quantize` does; only square blocks take a stack."""
    if block == SQUARE:
        return quantize_blocks(x, power_of_two=power_of_two)[0]
    if block == ROW_TILE:
        return quantize_rows(x, power_of_two=power_of_two)
    if block == COLUMN_TILE:
        return quantize_columns(x, power_of_two=power_of_two)
    raise ValueError(f"no kernel quantises blocks of {block} values")


def quantize_rows(x_RD: Tensor, *, power_of_two: bool) -> Quantized:
    """Return x, FP32, BF16 or FP16, in 1×128 tiles."""
    rows = empty_tiles(x_RD, *x_RD.shape, power_of_two=power_of_two)
    _launch_tiles(x_RD, rows, rows, True, False)
    return rows


def quantize_both(x_RD: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """Return x in 1×128 and in 128×1 tiles, from one read; the latter as a view of transposed memory."""
    rows = empty_tiles(x_RD, *x_RD.shape, power_of_two=power_of_two)
    columns = empty_tiles(x_RD, *reversed(x_RD.shape), power_of_two=power_of_two)
    _launch_tiles(x_RD, rows, columns, True, True)
    return rows, columns.T


def quantize_columns(x_RD: Tensor, *, power_of_two: bool) -> Quantized:
    """Return x in 128×1 tiles, a view of transposed memory."""
    columns = empty_tiles(x_RD, *reversed(x_RD.shape), power_of_two=power_of_two)
    _launch_tiles(x_RD, columns, columns, False, True)
    return columns.T


def requantize_columns(x_RD: Quantized) -> Quantized:
    """Return what is kept in 1×128 tiles in 128×1 tiles, a view of transposed memory.

    Values are decoded in FP32 and quantised again; with power-of-two scales decoding is exact.
    """
    rows, width = x_RD.codes.shape
    columns = empty_tiles(x_RD.codes, width, rows, power_of_two=x_RD.power_of_two)
    tensors = (x_RD.codes, x_RD.scales, columns.codes, columns.scales)
    launch(requantize_kernel, squares(rows, width), *tensors, rows, width, x_RD.power_of_two)
    return columns.T


def quantize_blocks(w_EOD: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """Return w [O, D] or [E, O, D] in 128×128 blocks, and the same of its transpose [D, O] or [E, D, O]."""
    *stack, rows, width = w_EOD.shape
    blocks = squares(rows, width)
    plain, transposed = (
        Quantized(
            w_EOD.new_empty(*stack, *shape, dtype=torch.float8_e4m3fn),
            w_EOD.new_empty(*stack, *scales, dtype=torch.float32),
            SQUARE,
            power_of_two,
        )
        for shape, scales in (((rows, width), blocks), ((width, rows), blocks[::-1]))
    )
    tensors = (w_EOD, plain.codes, plain.scales, transposed.codes, transposed.scales)
    grid = (*blocks, stack[0] if stack else 1)
    launch(blocks_kernel, grid, *tensors, rows, width, power_of_two)
    return plain, transposed


def empty_tiles(like: Tensor, rows: int, width: int, *, power_of_two: bool) -> Quantized:
    """Return memory for [rows, width] in 1×128 tiles."""
    codes = like.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scales = like.new_empty(rows, triton.cdiv(width, BLOCK), dtype=torch.float32)
    return Quantized(codes, scales, ROW_TILE, power_of_two)


def squares(rows: int, width: int, height: int = BLOCK) -> tuple[int, int]:
    """Return the grid that covers [rows, width] with one program for each square, height × 128."""
    return triton.cdiv(rows, height), triton.cdiv(width, BLOCK)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | bool) -> None:
    """Run a kernel that quantises, whose last parameter is INTERPRET; an empty grid runs nothing.

    Multiplications and additions are not fused: the last bit decides about a code.
    """
    if min(grid) > 0:
        kernel[grid](*arguments, INTERPRETED, num_warps=WARPS, enable_fp_fusion=False)


def _launch_tiles(
    x_RD: Tensor, rows: Quantized, columns: Quantized, want_rows: bool, want_columns: bool
) -> None:
    tensors = (x_RD, rows.codes, rows.scales, columns.codes, columns.scales)
    squares_of_x, size = squares(*x_RD.shape), tuple(x_RD.shape)
    launch(tiles_kernel, squares_of_x, *tensors, *size, want_rows, want_columns, rows.power_of_two)
