"""SwiGLU and quantisation in one kernel: interpreted, bit for bit both steps; compiled for both targets."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels import fp8, reference
from model.kernels.triton.swiglu import swiglu_and_quantize
from tests.model.kernels.compare import relative_error
from tests.model.kernels.triton.ahead_of_time import TARGETS, Variant
from tests.model.kernels.triton.catalogue import swiglus
from tests.model.kernels.triton.checks import check_compiled, check_same
from tests.model.kernels.triton.conftest import Interpret


def numpy_swiglu(gate: Tensor, up: Tensor, weights: Tensor) -> Tensor:
    """The plain function with the interpreter's exponential, which is not torch's to the last bit."""
    exponential = torch.from_numpy(np.exp(-gate.float().numpy()))
    return gate.float() / (1 + exponential) * up.float() * weights[:, None]


def check(rows: int, width: int, dtype: torch.dtype, power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    gate, up = (torch.randn(rows, width, generator=generator).mul(4).to(dtype) for _ in range(2))
    weights = torch.rand(rows, generator=generator)
    weights[:1] = 0
    options = {"power_of_two": power_of_two}
    hidden, gate_codes, up_codes = swiglu_and_quantize(gate, up, weights, **options)
    exact = numpy_swiglu(gate, up, weights)
    assert relative_error(exact, reference.swiglu(gate, up, weights)) <= 1e-6
    check_same(hidden, fp8.quantize(exact, fp8.ROW_TILE, **options))
    check_same(gate_codes, fp8.quantize(gate, fp8.ROW_TILE, **options))
    check_same(up_codes, fp8.quantize(up, fp8.ROW_TILE, **options))


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "FP32 scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(130, 200), (5, 3), (0, 128)], ids=str)
def test_equals_both_steps(
    interpret: Interpret, sizes: tuple[int, int], dtype: torch.dtype, power_of_two: bool
):
    interpret(check, *sizes, dtype, power_of_two)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", swiglus(), ids=lambda variant: variant.name)
def test_compiles(variant: Variant, target: str):
    check_compiled(variant, target)
