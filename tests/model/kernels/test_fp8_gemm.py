"""Block-scaled products against the promoted sum of the reference, and why promotion matters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import reference
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, Quantized, quantize
from model.kernels.fp8_gemm import block_scaled_mm, grouped_block_scaled_mm, grouped_block_scaled_outer
from tests.model.kernels.compare import relative_error

SHAPES = [(1, 1, 1), (5, 7, 9), (128, 128, 128), (130, 200, 300), (64, 256, 1000)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("product", ["output", "input gradient", "weight gradient"])
def test_products_are_the_promoted_sums(
    shape: tuple[int, int, int], power_of_two: bool, product: str
) -> None:
    """Within 1e-6 in FP32; in BF16 within one rounding of that."""
    m, n, k = shape
    a, b = normal(m, k), normal(n, k, seed=1)
    if product == "output":
        left, right = (
            quantize(x, block, power_of_two=power_of_two) for x, block in ((a, ROW_TILE), (b, SQUARE))
        )
    elif product == "input gradient":
        left = quantize(a, ROW_TILE, power_of_two=power_of_two)
        right = quantize(b.T.contiguous(), SQUARE, power_of_two=power_of_two).T
    else:
        left, right = (quantize(x.T.contiguous(), COLUMN_TILE, power_of_two=power_of_two).T for x in (a, b))
    expected = reference.block_scaled_mm(left, right)
    ours = block_scaled_mm(left, right, dtype=torch.float32)
    assert relative_error(ours, expected) < 1e-6
    rounded = block_scaled_mm(left, right, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded, expected) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_without_rounding_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    """Small integers: every partial sum is exact, so neither order nor promotion can matter."""
    generator = torch.Generator().manual_seed(4)
    codes = [torch.randint(-4, 5, (96, 512), generator=generator).float() for _ in range(2)]
    scales = [torch.randint(0, 2, (96, 4), generator=generator).float().exp2() for _ in range(2)]
    left, right = (
        Quantized(c.to(torch.float8_e4m3fn), s, ROW_TILE, power_of_two=True)
        for c, s in zip(codes, scales, strict=True)
    )
    ours = block_scaled_mm(left, right, dtype=dtype)
    assert torch.equal(ours, reference.block_scaled_mm(left, right).to(dtype))


def test_few_bf16_results_round_the_other_way() -> None:
    """The BF16 GEMM of exact operands against the promoted sum rounded to BF16."""
    left = quantize(normal(256, 1024), ROW_TILE, power_of_two=True)
    right = quantize(normal(256, 1024, seed=1), SQUARE, power_of_two=True)
    ours = block_scaled_mm(left, right, dtype=torch.bfloat16)
    expected = reference.block_scaled_mm(left, right).bfloat16()
    differing = (ours != expected).float().mean().item()
    assert differing < 1e-3
    steps = (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert steps[ours.float().abs() > 0.1].max() <= 1


def test_products_of_others_keep_their_precision() -> None:
    """Only exact operands may be rounded to BF16; also where a product fails."""
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    tiles, longer = (quantize(normal(4, width), ROW_TILE, power_of_two=True) for width in (128, 256))
    block_scaled_mm(tiles, tiles, dtype=torch.float32)
    assert backend.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        block_scaled_mm(tiles, longer, dtype=torch.float32)
    assert backend.matmul.fp32_precision == before


def test_what_is_not_finite_reaches_the_result() -> None:
    a, b = torch.ones(4, 256), torch.ones(3, 256)
    a[2, 130] = torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        out = block_scaled_mm(
            quantize(a, ROW_TILE, power_of_two=True), quantize(b, SQUARE, power_of_two=True), dtype=dtype
        )
        assert out[2].isnan().all()
        assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("sizes", [[128, 0, 256], [0, 0, 5], [0, 0, 0]])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_groups_are_products_of_their_own(sizes: list[int], power_of_two: bool) -> None:
    rows, width, outputs = sum(sizes), 200, 130
    x, weights, grad = normal(rows, width), normal(3, outputs, width, seed=1), normal(rows, outputs, seed=2)

    def quantized(y: Tensor, block: tuple[int, int]) -> Quantized:
        return quantize(y, block, power_of_two=power_of_two)

    out = grouped_block_scaled_mm(
        quantized(x, ROW_TILE), quantized(weights, SQUARE), sizes, dtype=torch.float32
    )
    outer = grouped_block_scaled_outer(
        quantized(grad, COLUMN_TILE), quantized(x, COLUMN_TILE), sizes, dtype=torch.float32
    )
    assert out.shape == (rows, outputs)
    assert outer.shape == weights.shape
    for index, (x_g, grad_g, out_g) in enumerate(zip(*(y.split(sizes) for y in (x, grad, out)), strict=True)):
        if not len(x_g):
            assert not outer[index].any()
            continue
        expected = reference.block_scaled_mm(quantized(x_g, ROW_TILE), quantized(weights[index], SQUARE))
        assert relative_error(out_g, expected) < 1e-6
        expected = reference.block_scaled_mm(quantized(grad_g, COLUMN_TILE).T, quantized(x_g, COLUMN_TILE).T)
        assert relative_error(outer[index], expected) < 1e-6


def test_tiles_may_not_belong_to_two_groups() -> None:
    tiles = quantize(normal(200, 4), COLUMN_TILE, power_of_two=True)
    with pytest.raises(ValueError, match="share tiles"):
        grouped_block_scaled_outer(tiles, tiles, [100, 100], dtype=torch.float32)


def test_rows_and_channels_with_outliers_need_blocks() -> None:
    """A few huge tokens and channels: the products of all others are lost with one scale for each tensor."""
    x, w = normal(128, 1024), normal(64, 1024, seed=1)
    x[3], x[:, 200], w[:, 200] = x[3] * 1e7, x[:, 200] * 1e3, w[:, 200] * 1e-3
    exact = x.double() @ w.double().T

    def error(left: Quantized, right: Quantized) -> float:
        out = reference.block_scaled_mm(left, right).double()
        others = torch.arange(len(x)) != 3
        return ((out - exact)[others].norm() / exact[others].norm()).item()

    def one_scale(y: Tensor) -> Quantized:
        whole = quantize(y, (len(y), y.shape[1]), power_of_two=False)
        repeated = whole.scales.expand(len(y), -(-y.shape[1] // 128))
        return Quantized(whole.codes, repeated, ROW_TILE, power_of_two=False)

    blocks = error(quantize(x, ROW_TILE, power_of_two=False), quantize(w, SQUARE, power_of_two=False))
    whole = error(one_scale(x), one_scale(w))
    assert blocks < 0.05
    assert whole > 0.9


def tensor_core_sum(a_MK: Tensor, b_NK: Tensor, *, promote_every: int) -> Tensor:
    """Return a b^T as an accumulator of 14 significant bits gives it: 32 products, then truncation."""
    total_MN = torch.zeros(len(a_MK), len(b_NK))
    for first in range(0, a_MK.shape[1], promote_every):
        low_MN = torch.zeros_like(total_MN)
        for k in range(first, first + promote_every, 32):
            low_MN += a_MK[:, k : k + 32] @ b_NK[:, k : k + 32].T
            low_MN = (low_MN.view(torch.int32) & ~((1 << 10) - 1)).view(torch.float32)
        total_MN += low_MN
    return total_MN


def test_long_sums_need_promotion() -> None:
    """Section 3.3.2: without it the accumulator of a Hopper tensor core errs by percents at K = 4096."""
    a, b = normal(32, 4096).abs(), normal(32, 4096, seed=1).abs()
    left, right = (quantize(x, (32, 4096), power_of_two=True).codes.float() for x in (a, b))
    exact = (left.double() @ right.double().T).float()
    promoted, plain = (
        relative_error(tensor_core_sum(left, right, promote_every=every), exact) for every in (128, 4096)
    )
    assert promoted < 2e-4
    assert plain > 10 * promoted
