"""Block quantisation: codes and scales bit for bit those of the element-by-element reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import reference
from model.kernels.fp8 import (
    COLUMN_TILE,
    LARGEST_CODE,
    ROW_TILE,
    SMALLEST_SCALE,
    SQUARE,
    BlockShape,
    Quantized,
    quantize,
    requantize,
)

BLOCKS = [ROW_TILE, COLUMN_TILE, SQUARE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0.0, -0.0, 1.0, 448.0, 464.0, 2.0**-9, 2.0**-10, 1e-40, -1e-45, 3e38, 65504.0, 2.0**-117 * 448]
"""Zeros, E4M3's own limits and the midpoints beyond them, subnormals, and the largest numbers."""


def assert_same(ours: Quantized, theirs: Quantized) -> None:
    """Compare bit by bit, so that zeros have a sign and NaN equals NaN."""
    assert ours.block == theirs.block
    assert ours.power_of_two == theirs.power_of_two
    assert torch.equal(ours.scales.view(torch.int32), theirs.scales.view(torch.int32))
    finite = ours.codes.view(torch.uint8) & 127 != 127
    assert torch.equal(ours.codes.view(torch.uint8) & 127, theirs.codes.view(torch.uint8) & 127)
    assert torch.equal(ours.codes.view(torch.uint8)[finite], theirs.codes.view(torch.uint8)[finite])


def wide_range(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal numbers times powers of two from 2^-20 to 2^10, different for each element."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 11, (rows, columns), generator=generator).float()
    return (torch.randn(rows, columns, generator=generator) * exponents.exp2()).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 5, 127, 128, 129]),
    columns=st.sampled_from([1, 3, 128, 130]),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(DTYPES),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**31),
    edges=st.lists(st.sampled_from([*EDGES, torch.inf, -torch.inf, torch.nan]), max_size=4),
)
def test_codes_and_scales_are_the_references(
    rows: int,
    columns: int,
    block: BlockShape,
    dtype: torch.dtype,
    power_of_two: bool,
    seed: int,
    edges: list[float],
) -> None:
    x = wide_range(rows, columns, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    for edge in edges:
        x.view(-1)[torch.randint(x.numel(), (), generator=generator)] = edge
    ours = quantize(x, block, power_of_two=power_of_two)
    assert_same(ours, reference.quantize(x, block, power_of_two=power_of_two))


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=140),
    power_of_two=st.booleans(),
)
def test_any_tile_of_floats(values: list[float], power_of_two: bool) -> None:
    x = torch.tensor([values])
    ours = quantize(x, ROW_TILE, power_of_two=power_of_two)
    assert_same(ours, reference.quantize(x, ROW_TILE, power_of_two=power_of_two))


def test_the_grid_of_the_reference_is_e4m3() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == reference.E4M3
    assert max(reference.E4M3) == LARGEST_CODE


def test_division_is_exact() -> None:
    """Values halfway between two codes show it: x * (1 / s) would round some of them the other way."""
    largest = torch.tensor(1.8847743272781372)
    halfway = [(a + b) / 2 for a, b in itertools.pairwise(reference.E4M3[8:])]
    x = torch.zeros(1, 128)
    x[0, : len(halfway)] = torch.tensor(halfway) * (largest / 448)
    x[0, -1] = largest
    ours = quantize(x, ROW_TILE, power_of_two=False)
    assert_same(ours, reference.quantize(x, ROW_TILE, power_of_two=False))
    by_reciprocal = (x * (1 / ours.scales)).to(torch.float8_e4m3fn)
    assert (by_reciprocal.view(torch.uint8) != ours.codes.view(torch.uint8)).any()


def test_scales_of_known_tiles() -> None:
    """An all-zero tile has scale 1; the others amax / 448, up to a power of two, never below 2^-117."""
    amax = [0.0, 448.0, 449.0, 1.0, 1e-45, 448 * 2.0**-117, 3.4e38]
    x = torch.tensor(amax)[:, None].expand(-1, 128).contiguous()
    rounded = quantize(x, ROW_TILE, power_of_two=True).scales[:, 0].tolist()
    assert rounded == [1.0, 1.0, 2.0, 2.0**-8, SMALLEST_SCALE, SMALLEST_SCALE, 2.0**120]
    exact = quantize(x, ROW_TILE, power_of_two=False).scales[:, 0]
    assert exact[[1, 2, 3]].tolist() == [1.0, (x[2, 0] / 448).item(), (x[3, 0] / 448).item()]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_stays_visible(
    block: BlockShape, bad: float, dtype: torch.dtype, power_of_two: bool
) -> None:
    """In its own block, which it makes NaN, and nowhere else."""
    x = torch.ones(256, 256, dtype=dtype)
    x[3, 5] = bad
    quantized = quantize(x, block, power_of_two=power_of_two)
    for decoded in (
        quantized.dequantize(),
        quantized.dequantize(torch.bfloat16),
        requantize(quantized, block).dequantize(),
    ):
        assert decoded[: block[0], : block[1]].isnan().sum() in (0, block[0] * block[1])
        nan = decoded.isnan()
        assert nan[3, 5]
        assert nan.sum() == block[0] * block[1]


@pytest.mark.parametrize("shape", [(0, 128), (1, 1), (5, 300), (130, 7), (2, 130, 200), (3, 0, 4)])
@pytest.mark.parametrize("block", BLOCKS)
def test_decoding(shape: tuple[int, ...], block: BlockShape) -> None:
    """codes * scales in FP32, exact in BF16 with powers of two; transposed and stacked as well."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for power_of_two in (False, True):
        quantized = quantize(x, block, power_of_two=power_of_two)
        assert quantized.codes.shape == x.shape
        scales = quantized.scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
        expected = quantized.codes.float() * scales[..., : shape[-2], : shape[-1]]
        assert torch.equal(quantized.dequantize(), expected)
        assert torch.equal(quantized.T.dequantize(), expected.mT)
        if power_of_two:
            assert torch.equal(quantized.dequantize(torch.bfloat16).float(), expected)
        if len(shape) == 3:
            for index, matrix in enumerate(x):
                alone = quantize(matrix, block, power_of_two=power_of_two)
                assert torch.equal(alone.dequantize(), expected[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_under_the_largest_scale(dtype: torch.dtype) -> None:
    """2^120, which times 2^8 would overflow."""
    x = torch.full((1, 128), 3.3e38)
    x[0, 1:3] = torch.tensor([0.75, -0.15625]) * 2.0**120
    coded = quantize(x, ROW_TILE, power_of_two=True)
    assert coded.scales == 2.0**120
    assert coded.dequantize(dtype)[0, 1:3].tolist() == x[0, 1:3].tolist()


def test_turning_tiles_costs_next_to_nothing_with_powers_of_two() -> None:
    """The weight gradient's 128 x 1 tiles from kept 1 x 128 tiles, against tiles from the tensor itself."""
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2))
    error = {}
    for power_of_two in (False, True):
        direct = quantize(x, COLUMN_TILE, power_of_two=power_of_two).dequantize()
        turned = requantize(quantize(x, ROW_TILE, power_of_two=power_of_two), COLUMN_TILE).dequantize()
        error[power_of_two] = [((y - x).norm() / x.norm()).item() for y in (direct, turned)]
    assert error[True][1] < 1.01 * error[True][0]
    assert error[False][1] > 1.2 * error[False][0]


def test_one_outlier_spoils_its_own_block_only() -> None:
    """Why blocks: with one scale for the tensor, everything beside an outlier falls below E4M3's range."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    x[7, 100], x[:, 300] = 3e7, x[:, 300] * 1e4
    ordinary = torch.ones_like(x, dtype=torch.bool)
    ordinary[7], ordinary[:, 256:384] = False, False

    def error(y: Tensor) -> float:
        return ((y - x)[ordinary].norm() / x[ordinary].norm()).item()

    blocks = error(quantize(x, ROW_TILE, power_of_two=True).dequantize())
    whole = error(quantize(x, (256, 512), power_of_two=True).dequantize())
    assert blocks < 0.03
    assert whole > 0.9
