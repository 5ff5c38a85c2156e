"""FP8 products in Triton: interpreted, against the plain promoted sum; compiled for both targets."""

import pytest
import torch

from model.kernels import fp8, reference
from model.kernels.triton import gemm, quantize
from tests.model.kernels.compare import relative_error
from tests.model.kernels.triton.ahead_of_time import TARGETS, Variant
from tests.model.kernels.triton.catalogue import products
from tests.model.kernels.triton.checks import check_compiled
from tests.model.kernels.triton.conftest import Interpret


def check(a: fp8.Quantized, b: fp8.Quantized) -> None:
    out = gemm.block_scaled_mm(a, b, dtype=torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out, reference.block_scaled_mm(a, b)) <= 1e-6
    assert torch.equal(gemm.block_scaled_mm(a, b, dtype=torch.bfloat16), out.bfloat16())


def check_linear(rows: int, width: int, outputs: int, power_of_two: bool) -> None:
    """Compare the three products of a linear layer, of whose channels and tokens some are outliers."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    x[:, width // 2] *= 100
    w = torch.randn(outputs, width, generator=generator).mul(0.02)
    dy = torch.randn(rows, outputs, generator=generator)
    dy[rows // 2] *= 1000
    x_rows, x_columns = quantize.quantize_both(x, power_of_two=power_of_two)
    dy_rows, dy_columns = quantize.quantize_both(dy, power_of_two=power_of_two)
    w_blocks, w_transposed = quantize.quantize_blocks(w, power_of_two=power_of_two)
    check(x_rows, w_blocks)
    check(dy_rows, w_transposed)
    check(dy_rows, w_blocks.T)
    check(dy_columns.T, x_columns.T)


def check_configurations() -> None:
    """Compare in every tile that autotuning may choose; otherwise the first one is interpreted."""
    for name in ("BLOCK_SCALES", "ROW_SCALES"):
        for config in getattr(gemm, name):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gemm, name, (config,))
                check_linear(130, 200, 140, True)


def check_empty() -> None:
    nothing = quantize.quantize_rows(torch.empty(0, 128), power_of_two=True)
    something = quantize.quantize_rows(torch.ones(3, 128), power_of_two=True)
    assert gemm.block_scaled_mm(nothing, something, dtype=torch.float32).shape == (0, 3)
    no_depth = quantize.quantize_rows(torch.empty(3, 0), power_of_two=True)
    assert torch.equal(gemm.block_scaled_mm(no_depth, no_depth, dtype=torch.float32), torch.zeros(3, 3))


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "FP32 scales"])
@pytest.mark.parametrize(
    "sizes",
    [(130, 200, 140), (5, 3, 2), (128, 256, 64), (300, 130, 129)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_three_products(interpret: Interpret, sizes: tuple[int, int, int], power_of_two: bool):
    interpret(check_linear, *sizes, power_of_two)


def test_a_second_band_of_rows_that_is_not_full(interpret: Interpret):
    """Nine rows of tiles, of which programs walk through eight at a time."""
    interpret(check_linear, 1100, 5, 130, True)


def test_every_configuration(interpret: Interpret):
    interpret(check_configurations)


def test_empty(interpret: Interpret):
    interpret(check_empty)


def test_refuses_tiles_along_the_wrong_dimension():
    tiles = fp8.quantize(torch.ones(128, 256), fp8.ROW_TILE, power_of_two=True)
    with pytest.raises(ValueError, match=r"blocks of \(128, 1\) values"):
        gemm.block_scaled_mm(tiles.T, tiles, dtype=torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", products(), ids=lambda variant: variant.name)
def test_compiles(variant: Variant, target: str):
    check_compiled(variant, target)
