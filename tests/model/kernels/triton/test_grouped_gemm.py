"""The experts' FP8 products in Triton: interpreted, against a plain loop over experts; compiled for both."""

from functools import partial

import pytest
import torch

from model.kernels import fp8, reference
from model.kernels.triton import grouped_gemm, quantize
from tests.model.kernels.compare import relative_error
from tests.model.kernels.triton.ahead_of_time import TARGETS, Variant
from tests.model.kernels.triton.catalogue import grouped_products
from tests.model.kernels.triton.checks import check_compiled
from tests.model.kernels.triton.conftest import Interpret

WIDTH, OUTPUTS = 200, 140


def part(x: fp8.Quantized, rows: slice) -> fp8.Quantized:
    return fp8.Quantized(x.codes[rows], x.scales[rows], x.block, x.power_of_two)


def check_rows(sizes: list[int], power_of_two: bool) -> None:
    """Compare the product of every row with its own expert's weight, and with its transpose."""
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes), WIDTH, generator=generator)
    dy = torch.randn(sum(sizes), OUTPUTS, generator=generator)
    w = torch.randn(len(sizes), OUTPUTS, WIDTH, generator=generator)
    weights = quantize.quantize_blocks(w, power_of_two=power_of_two)
    for rows, weight in zip((x, dy), weights, strict=True):
        codes = quantize.quantize_rows(rows, power_of_two=power_of_two)
        out = grouped_gemm.grouped_block_scaled_mm(codes, weight, sizes, dtype=torch.float32)
        assert out.shape == (sum(sizes), weight.codes.shape[1])
        first = 0
        for expert, size in enumerate(sizes):
            own = slice(first, first + size)
            own_weight = fp8.Quantized(
                weight.codes[expert], weight.scales[expert], weight.block, weight.power_of_two
            )
            expected = reference.block_scaled_mm(part(codes, own), own_weight)
            assert relative_error(out[own], expected) <= 1e-6
            first += size


def check_outer(sizes: list[int]) -> None:
    """Compare the gradient of every expert's weight with the product of its own rows."""
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes), WIDTH, generator=generator)
    dy = torch.randn(sum(sizes), OUTPUTS, generator=generator)
    codes = [quantize.quantize_columns(rows, power_of_two=True) for rows in (dy, x)]
    out = grouped_gemm.grouped_block_scaled_outer(*codes, sizes, dtype=torch.float32)
    assert out.shape == (len(sizes), OUTPUTS, WIDTH)
    first = 0
    for expert, size in enumerate(sizes):
        own = [
            fp8.quantize(rows[first : first + size], fp8.COLUMN_TILE, power_of_two=True) for rows in (dy, x)
        ]
        expected = reference.block_scaled_mm(own[0].T, own[1].T) if size else torch.zeros(OUTPUTS, WIDTH)
        assert relative_error(out[expert], expected) <= 1e-6
        first += size


def check_configurations() -> None:
    """Compare in every tile that autotuning may choose; otherwise the first one is interpreted."""
    for name, check, sizes in (
        ("GROUPED_CONFIGS", partial(check_rows, power_of_two=True), [70, 0, 130, 1]),
        ("ROW_SCALES", check_outer, [128, 0, 70]),
    ):
        for config in getattr(grouped_gemm, name):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(grouped_gemm, name, (config,))
                check(sizes)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "FP32 scales"])
@pytest.mark.parametrize("sizes", [[70, 0, 130, 1], [0, 0, 3], [128, 256, 0], [0]], ids=str)
def test_rows_with_their_experts(interpret: Interpret, sizes: list[int], power_of_two: bool):
    interpret(check_rows, sizes, power_of_two)


@pytest.mark.parametrize("sizes", [[128, 0, 256], [0, 128, 70], [0, 0]], ids=str)
def test_gradients_of_weights(interpret: Interpret, sizes: list[int]):
    interpret(check_outer, sizes)


def test_every_configuration(interpret: Interpret):
    interpret(check_configurations)


def test_tiles_belong_to_one_expert():
    assert grouped_gemm.row_tiles([70, 0, 130, 1]) == [(0, 0, 70), (2, 70, 200), (2, 198, 200), (3, 200, 201)]


def test_refuses_experts_that_share_tiles():
    x = fp8.quantize(torch.ones(200, 128), fp8.COLUMN_TILE, power_of_two=True)
    with pytest.raises(ValueError, match="pad each to a multiple"):
        grouped_gemm.grouped_block_scaled_outer(x, x, [100, 100], dtype=torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", grouped_products(), ids=lambda variant: variant.name)
def test_compiles(variant: Variant, target: str):
    check_compiled(variant, target)
