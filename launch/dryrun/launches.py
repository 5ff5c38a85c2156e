"""The Triton kernels of FP8 without a GPU: everything but the kernel itself.

The functions around the kernels (model/kernels/triton) allocate results and prepare operands, which is what a
device's memory sees; then they launch. Here a launch does nothing, for there is neither a device nor a value,
and the FLOPs of a product are counted from its operands.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted_launches(count: Callable[[int], None]) -> Iterator[None]:
    """Let Triton's kernels not run inside; `count` is told the FLOPs of each product."""
    from model.kernels.triton import (
        gemm,
        grouped_gemm,
        quantize,
        swiglu,
    )  # Triton is imported where it is used

    def multiply(
        kernel: Any, configs: Any, grid: Any, a_codes: Any, a_scales: Any, b_codes: Any, *_: Any
    ) -> None:
        # a is [M, K] and b [N, K], or [E, N, K] of which a row of a meets one; also where K sums over rows
        count(2 * a_codes.numel() * b_codes.shape[-2])

    def nothing(*_: Any) -> None:
        pass

    instead = [(gemm, multiply), (grouped_gemm, multiply), (quantize, nothing), (swiglu, nothing)]
    before = [module.launch for module, _ in instead]
    for module, launch in instead:
        setattr(module, "launch", launch)  # noqa: B010  # a name of the module, not of an instance
    try:
        yield
    finally:
        for (module, _), launch in zip(instead, before, strict=True):
            setattr(module, "launch", launch)  # noqa: B010
