"""Cutting element-wise work into row blocks that stay in a core's cache.

An FP32 chain of torch operations over a BF16 tensor would write every intermediate to memory. Done block by
block into scratch tensors of this size, the intermediates never leave the second-level cache: each operand is
read once, each result written once, and all arithmetic is FP32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 16
"""Elements of one block: 256 KiB per FP32 scratch tensor."""


def row_blocks(num_rows: int, width: int, *, elements: int | None = None) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows of `width` elements, each about `elements` elements.

    elements: BLOCK_ELEMENTS if None.
    """
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, width))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def scratch_rows(num_rows: int, width: int, *, elements: int | None = None) -> int:
    """Return the number of rows of the largest block that `row_blocks` yields."""
    return min(num_rows, max(1, (elements or BLOCK_ELEMENTS) // max(1, width)))


def wide_type(x: Tensor) -> torch.dtype:
    """Return the type of the arithmetic: FP64 for FP64 inputs (gradient checks), FP32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
