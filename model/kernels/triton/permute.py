"""Permuting token rows into the order of experts, quantised on the way (arXiv 2412.19437, section 3.3.3).

The rows that are sent to experts are FP8: codes and one scale for each 128 channels. A token goes to A
experts as the same codes, so it is read and quantised once and its codes are written A times, which moves
2 + A bytes for each of its values where permuting BF16 rows and quantising them would move 2 + 5 A.

Legend: T tokens, D hidden, A experts of a token, R = T A rows sorted by expert. In the kernel: N tokens and
W channels of one square.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import BLOCK, Quantized
from model.kernels.triton.quantize import empty_tiles, launch, load_square, squares, store_row_tiles

_HEIGHT = tl.constexpr(BLOCK)


@triton.jit
def permute_kernel(
    x_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    T: tl.tensor,
    D: tl.tensor,
    A: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise one square of tokens and store it in the A rows of each; one program a square."""
    i, j = tl.program_id(0), tl.program_id(1)
    x_NW, token, _ = load_square(x_ptr, i, j, T, D, _HEIGHT)
    for choice in range(A):  # type: ignore[arg-type]
        # a row outside stands for a token outside: it is not stored
        row = tl.load(rows_ptr + token.to(tl.int64) * A + choice, mask=token < T, other=T * A)
        store_row_tiles(x_NW, codes_ptr, scales_ptr, row, j, T * A, D, POWER_OF_TWO, INTERPRET)


def permute_and_quantize(x_TD: Tensor, row_TA: Tensor, *, power_of_two: bool) -> Quantized:
    """Return x of token t as each of the rows row_TA[t], quantised in 1×128 tiles, [R, D].

    x [T, D]: FP32, BF16 or FP16; row [T, A], int64: every number from 0 to R - 1 once.
    """
    (tokens, width), experts = x_TD.shape, row_TA.shape[1]
    out = empty_tiles(x_TD, row_TA.numel(), width, power_of_two=power_of_two)
    tensors = (x_TD, row_TA.contiguous(), out.codes, out.scales)
    launch(permute_kernel, squares(tokens, width), *tensors, tokens, width, experts, power_of_two)
    return out
