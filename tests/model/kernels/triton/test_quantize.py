"""FP8 quantisation in Triton: interpreted, bit for bit the plain version; compiled for both targets."""

import pytest
import torch
from torch import Tensor

from model.kernels import fp8
from model.kernels.triton import quantize
from tests.model.kernels.triton.ahead_of_time import TARGETS, Variant
from tests.model.kernels.triton.catalogue import quantisers
from tests.model.kernels.triton.checks import check_compiled, check_same
from tests.model.kernels.triton.conftest import Interpret


def wide(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Values of many magnitudes; the first row is zero."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    magnitude = torch.randn(rows, width, generator=generator).mul(3).exp()
    x = (torch.randn(rows, width, generator=generator) * magnitude).to(dtype)
    x[0] = 0
    return x


def every_code() -> Tensor:
    """Tiles of scale 1 with all codes, the midpoints between them, and the numbers next to those, FP32."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (codes[1:] + codes[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    below, above = torch.nextafter(midpoints, -infinity), torch.nextafter(midpoints, infinity)
    values = torch.cat([codes, midpoints, below, above])
    values = torch.cat([values, -values])
    tiles = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    return torch.cat([torch.full((len(tiles), 1), 448.0), tiles], 1)


def exceptional() -> Tensor:
    """Infinities, NaN, the largest, the smallest and denormal numbers, one kind a row, FP32."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    x[0, 3], x[1, 200], x[2, 5] = torch.inf, -torch.inf, torch.nan
    x[3, 7], x[4] = torch.finfo(torch.float32).max, 1e-45
    x[5] *= 1e-40
    x[6] *= 2.0**-117
    x[7] = -0.0
    return x


def check_all(x: Tensor) -> None:
    for power_of_two in (True, False):
        options = {"power_of_two": power_of_two}
        rows, columns = quantize.quantize_both(x, **options)
        expected_rows = fp8.quantize(x, fp8.ROW_TILE, **options)
        check_same(rows, expected_rows)
        check_same(columns, fp8.quantize(x, fp8.COLUMN_TILE, **options))
        for block in (fp8.ROW_TILE, fp8.COLUMN_TILE, fp8.SQUARE):
            check_same(quantize.quantize(x, block, **options), fp8.quantize(x, block, **options))
        check_same(quantize.requantize_columns(rows), fp8.requantize(expected_rows, fp8.COLUMN_TILE))
        blocks, transposed = quantize.quantize_blocks(x, **options)
        check_same(blocks, fp8.quantize(x, fp8.SQUARE, **options))
        check_same(transposed, fp8.quantize(x.T, fp8.SQUARE, **options))


def check_sizes(dtype: torch.dtype) -> None:
    for rows, width in ((130, 200), (1, 128), (5, 3)):
        check_all(wide(rows, width, dtype))


def check_codes() -> None:
    check_all(every_code())


def check_exceptional() -> None:
    check_all(exceptional())


def check_stack() -> None:
    x = torch.stack([wide(70, 130, torch.bfloat16), wide(70, 130, torch.bfloat16).mul(7)])
    blocks, transposed = quantize.quantize_blocks(x, power_of_two=True)
    check_same(blocks, fp8.quantize(x, fp8.SQUARE, power_of_two=True))
    check_same(transposed, fp8.quantize(x.mT, fp8.SQUARE, power_of_two=True))


def check_empty() -> None:
    rows, columns = quantize.quantize_both(torch.empty(0, 200), power_of_two=True)
    assert rows.codes.shape == columns.codes.shape == (0, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes(interpret: Interpret, dtype: torch.dtype):
    interpret(check_sizes, dtype)


@pytest.mark.parametrize("check", [check_codes, check_exceptional, check_stack, check_empty])
def test_values(interpret: Interpret, check: Interpret):
    interpret(check)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", quantisers(), ids=lambda variant: variant.name)
def test_compiles(variant: Variant, target: str):
    check_compiled(variant, target)
