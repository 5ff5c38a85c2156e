"""What compiled kernels must be, and how FP8 tensors are compared."""

import torch

from model.kernels.fp8 import Quantized
from tests.model.kernels.triton.ahead_of_time import Variant, compile_for


def check_compiled(variant: Variant, target: str) -> None:
    """Compile `variant`; it spills nothing, fits a block's shared memory, and multiplies on tensor cores."""
    compiled = compile_for(variant, target)
    assert compiled.stack == 0, "registers spilled"
    assert compiled.shared <= 227 * 1024, "more shared memory than a block may have"
    assert compiled.inexact_divisions == 0, "a quotient that is not exactly rounded may have another code"
    if variant.multiplies:
        # 128 of K are four instructions of 32 for each 64 rows (sm_90) or more
        assert compiled.products >= 4
        assert compiled.fp8_products == compiled.products


def check_same(actual: Quantized, expected: Quantized) -> None:
    """Codes and scales are bit-identical; where a scale is NaN, the codes below it say nothing."""
    assert actual.block == expected.block
    assert actual.power_of_two == expected.power_of_two
    assert actual.codes.shape == expected.codes.shape
    torch.testing.assert_close(actual.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
    known = ~expected.dequantize().isnan()
    codes = [x.codes.contiguous().view(torch.uint8)[known] for x in (actual, expected)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(actual.dequantize().isnan(), ~known)
