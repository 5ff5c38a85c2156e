"""SwiGLU with FP8 results in Triton (arXiv 2412.19437, sections 3.2.3 and 3.3.3).

Between the products of an expert, gate and up arrive in BF16. One pass over them gives all that follows:

* hidden = silu(gate) · up · weight, in FP32 and from there straight to codes, for the down projection;
* gate and up as codes: what is kept for the backward pass, in which hidden is computed again.

Unfused, hidden would be written in FP32 and read again. Nothing is contracted to fused multiply-adds, and the
quotient in silu is exactly rounded, so that only the exponential function can differ from the plain version.

Legend: X rows, I width of an expert. In kernels: N rows and W columns of one square.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import Quantized
from model.kernels.triton.quantize import empty_tiles, launch, load_square, squares, store_row_tiles

HEIGHT = 64
"""Rows of one square: the values of three, at 128, would not fit a thread's registers."""
_HEIGHT = tl.constexpr(HEIGHT)


@triton.jit
def swiglu_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    hidden_codes_ptr: tl.tensor,
    hidden_scales_ptr: tl.tensor,
    gate_codes_ptr: tl.tensor,
    gate_scales_ptr: tl.tensor,
    up_codes_ptr: tl.tensor,
    up_scales_ptr: tl.tensor,
    X: tl.tensor,
    I: tl.tensor,  # noqa: E741
    POWER_OF_TWO: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """Quantise one square of hidden, gate and up by rows; one program a square."""
    i, j = tl.program_id(0), tl.program_id(1)
    gate_NW, row, _ = load_square(gate_ptr, i, j, X, I, _HEIGHT)
    up_NW, _, _ = load_square(up_ptr, i, j, X, I, _HEIGHT)
    weight_N = tl.load(weights_ptr + row, mask=row < X, other=0.0)
    silu_NW = tl.div_rn(gate_NW, 1.0 + tl.exp(-gate_NW))
    hidden_NW = silu_NW * up_NW * weight_N[:, None]
    store_row_tiles(hidden_NW, hidden_codes_ptr, hidden_scales_ptr, row, j, X, I, POWER_OF_TWO, INTERPRET)
    store_row_tiles(gate_NW, gate_codes_ptr, gate_scales_ptr, row, j, X, I, POWER_OF_TWO, INTERPRET)
    store_row_tiles(up_NW, up_codes_ptr, up_scales_ptr, row, j, X, I, POWER_OF_TWO, INTERPRET)


def swiglu_and_quantize(
    gate_XI: Tensor, up_XI: Tensor, row_weights_X: Tensor, *, power_of_two: bool
) -> tuple[Quantized, Quantized, Quantized]:
    """Return silu(gate) * up * weight of each row, gate, and up, all [X, I] in 1×128 tiles.

    gate and up [X, I]: BF16, FP16 or FP32; row_weights [X], FP32.
    """
    rows, width = gate_XI.shape
    hidden, gate, up = (empty_tiles(gate_XI, rows, width, power_of_two=power_of_two) for _ in range(3))
    inputs = (gate_XI, up_XI, row_weights_X)
    outputs = (hidden.codes, hidden.scales, gate.codes, gate.scales, up.codes, up.scales)
    launch(swiglu_kernel, squares(rows, width, HEIGHT), *inputs, *outputs, rows, width, power_of_two)
    return hidden, gate, up
