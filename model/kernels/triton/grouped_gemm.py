"""Block-scaled FP8 products of all routed experts, each in one launch (arXiv 2412.19437, sections 3.2, 3.3).

Rows are sorted by expert, expert e owning `sizes[e]` of them, and none is as usual as many:

    forward          y  [X, N]    = x [X, K] · w_e [N, K]ᵀ    each row with its expert's weight
    input gradient                the same with w_eᵀ in the place of w_e
    weight gradient  dw [E, M, N] = dyᵀ [M, X_e] · xᵀ [N, X_e]ᵀ   each expert over its own rows

The first is cut along rows: a list of tiles, made from the sizes, says of each which expert's it is, where
it begins and where that expert's rows end. Experts without rows have no tile. Programs go through the columns
of a tile first: its rows and its expert's weight then stay in the second-level cache, and each is read from
memory about once. The second is cut over all gradients; an expert without rows sums nothing and stores zeros.

Tiles of 128 rows share a scale in the weight gradient, so there experts begin at multiples of 128.

Legend: X rows of all experts, E experts, N and M columns of the result, K what is summed over.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import BLOCK, ROW_TILE, SQUARE, Quantized
from model.kernels.triton.gemm import (
    BLOCK_SCALES,
    ROW_SCALES,
    k_major,
    launch,
    num_tiles,
    scaled_product,
    store_tile,
    stored_type,
    tile_of_program,
)

TILE_ROWS = 128
"""Rows of a tile, whatever the configuration: the list of tiles is made before one is chosen."""
GROUPED_CONFIGS = tuple(config for config in BLOCK_SCALES if config.kwargs["BLOCK_M"] == TILE_ROWS)

_TILE = tl.constexpr(BLOCK)


@triton.jit
def grouped_kernel(
    a_ptr: tl.tensor,
    a_scales_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write one tile of rows of one expert; tiles [.., 3]: expert, first row, end of the expert's rows."""
    num_j = tl.cdiv(N, BLOCK_N)
    entry = tiles_ptr + 3 * (tl.program_id(0) // num_j)
    j = tl.program_id(0) % num_j
    expert, first_row, end = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    row = first_row + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = scaled_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        a_ptr,
        a_scales_ptr,
        b_ptr + expert * N * K,
        b_scales_ptr + expert * tl.cdiv(N, _TILE) * tl.cdiv(K, _TILE),
        tl.minimum(row, end - 1),
        tl.minimum(column, N - 1),
        K,
        0,  # type: ignore[arg-type]
        tl.cdiv(K, _TILE),
        j * BLOCK_N // _TILE,
        True,  # type: ignore[arg-type]
    )
    store_tile(out_ptr, acc, row, column, end, N)


@triton.jit
def outer_kernel(
    a_ptr: tl.tensor,
    a_scales_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    X: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write one tile of one expert's aᵀ b; bounds [E + 1]: where experts' tiles of rows begin."""
    expert = tl.program_id(1)
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
        X,
        tl.load(bounds_ptr + expert),
        tl.load(bounds_ptr + expert + 1),
        j,
        False,  # type: ignore[arg-type]
    )
    store_tile(out_ptr + expert.to(tl.int64) * M * N, acc, row, column, M, N)


def grouped_block_scaled_mm(
    a_XK: Quantized, b_ENK: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return a_x b_eᵀ of each row x and its expert e, [X, N], rounded once to `dtype`.

    a in 1×128 tiles, b in 128×128 blocks; sizes: rows of each expert, in order, zeros allowed, of any size.
    """
    a, b = k_major(a_XK, (ROW_TILE,)), k_major(b_ENK, (SQUARE,))
    (X, K), N = a.codes.shape, b.codes.shape[1]
    out_XN = a.codes.new_empty(X, N, dtype=stored_type(dtype))
    tiles = torch.tensor(row_tiles(sizes), dtype=torch.int32, device=out_XN.device)
    if tiles.numel() and N:
        tensors = (a.codes, a.scales, b.codes, b.scales, out_XN, tiles)
        launch(_grouped, GROUPED_CONFIGS, num_tiles(len(tiles) * TILE_ROWS, N), *tensors, N, K)
    return out_XN.to(dtype)


def row_tiles(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Return of each tile of rows (its expert, its first row, the end of that expert's rows)."""
    ends = list(accumulate(sizes))
    return [
        (expert, first, end)
        for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
        for first in range(end - size, end, TILE_ROWS)
    ]


def grouped_block_scaled_outer(
    a_XM: Quantized, b_XN: Quantized, sizes: list[int], *, dtype: torch.dtype
) -> Tensor:
    """Return of each expert the sum over its rows of a_xᵀ b_x, [E, M, N]; zeros of experts without rows.

    Both in 128×1 tiles. Raises ValueError unless every expert begins at a multiple of 128 rows.
    """
    if any(end % BLOCK for end in accumulate(sizes[:-1])):
        raise ValueError(f"experts of {sizes} rows share tiles of {BLOCK} rows; pad each to a multiple")
    a, b = (k_major(x.T, (ROW_TILE,)) for x in (a_XM, b_XN))
    (M, X), N = a.codes.shape, len(b.codes)
    out_EMN = a.codes.new_empty(len(sizes), M, N, dtype=stored_type(dtype))
    ends = [-(-end // BLOCK) for end in accumulate(sizes)]
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=out_EMN.device)
    if out_EMN.numel():
        tensors = (a.codes, a.scales, b.codes, b.scales, out_EMN, bounds)
        launch(_outer, ROW_SCALES, num_tiles(M, N, len(sizes)), *tensors, M, N, X)
    return out_EMN.to(dtype)


# the number of rows changes at every step: only the sizes that stay choose a configuration
_grouped = triton.autotune(list(GROUPED_CONFIGS), key=["N", "K"])(grouped_kernel)
_outer = triton.autotune(list(ROW_SCALES), key=["M", "N"])(outer_kernel)
