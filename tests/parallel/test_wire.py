"""Rows as bytes: nothing is lost that the experts would keep, and gradients pass as if nothing were coded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import Recompute
from model.kernels import reference
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, quantize, requantize
from model.recompute import saving
from parallel.wire import Fp8Wire, Gather, NumberWire, Trip, Way, decode, encode, gather, shell
from tests.model.live_bytes import LiveBytes

DTYPES = [torch.bfloat16, torch.float32]
WIDTHS = [1, 5, 127, 128, 129, 160, 256, 300]


def wide_range(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return rows whose tiles, and numbers inside a tile, differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size_R1 = torch.randint(-110, 100, (rows, 1), generator=generator)
    size_RD = size_R1 + torch.randint(-12, 12, (rows, width), generator=generator)
    x_RD = torch.randn(rows, width, generator=generator) * torch.exp2(size_RD.float())
    return x_RD.masked_fill(torch.rand(rows, width, generator=generator) < 0.1, 0).to(dtype)


@given(
    st.integers(0, 9), st.sampled_from(WIDTHS), st.sampled_from(DTYPES), st.integers(0, 2**32), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_the_experts_find_what_they_would_have_found(
    rows: int, width: int, dtype: torch.dtype, seed: int, largest_is_224: bool
) -> None:
    """Bit for bit: the decoded rows, and what comes of quantising these again in either direction."""
    x_RD = wide_range(rows, width, dtype, seed)
    if (
        largest_is_224 and rows
    ):  # rounds to half of what the scale allows: quantised again it gets another one
        x_RD[0, :128] = x_RD[0, :128].sign() * 225.0
    found_RD = decode(encode(x_RD), dtype)
    assert found_RD.dtype == dtype
    by_row_RD = quantize(x_RD, ROW_TILE, power_of_two=True)
    expected_RD = by_row_RD.dequantize(torch.float32)
    assert torch.equal(found_RD.float(), expected_RD)
    assert torch.equal(quantize(found_RD, ROW_TILE, power_of_two=True).dequantize(), expected_RD)
    assert torch.equal(decode(encode(found_RD), dtype), found_RD)
    again_RD, turned_RD = (
        requantize(quantize(x, ROW_TILE, power_of_two=True), COLUMN_TILE) for x in (found_RD, x_RD)
    )
    assert torch.equal(again_RD.dequantize(), turned_RD.dequantize())


@pytest.mark.parametrize("width", [130, 256])
def test_bytes_are_codes_and_then_exponents(width: int) -> None:
    """Against the element-by-element reference."""
    x_RD = wide_range(4, width, torch.float32, 1)
    bytes_RB, expected = encode(x_RD), reference.quantize(x_RD, ROW_TILE, power_of_two=True)
    assert bytes_RB.dtype == torch.uint8
    assert bytes_RB.shape == (4, width + 2)
    assert torch.equal(bytes_RB[:, :width], expected.codes.view(torch.uint8))
    assert bytes_RB[:, width:].tolist() == (expected.scales.log2() + 127).int().tolist()


def test_a_row_written_out() -> None:
    x_1D = torch.zeros(1, 129)
    x_1D[0, 0], x_1D[0, 1], x_1D[0, 128] = 448.0 * 4, -2.0 * 4, 0.75 * 2.0**-130
    bytes_B = encode(x_1D)[0]
    assert bytes_B[[0, 1, 2]].tolist() == [0b0_1111_110, 0b1_1000_000, 0]  # 448, -2, 0
    assert bytes_B[129:].tolist() == [127 + 2, 127 - 117]  # 2^2, and the smallest scale
    assert decode(bytes_B[None], torch.float32)[0, :2].tolist() == [1792.0, -8.0]


def test_a_tile_that_is_not_finite_arrives_as_nan() -> None:
    x_RD = torch.ones(3, 300, dtype=torch.bfloat16)
    x_RD[0, 130], x_RD[2, 299] = torch.inf, torch.nan
    found_RD = decode(encode(x_RD), torch.bfloat16)
    assert found_RD[0].isnan().nonzero().flatten().tolist() == list(range(128, 256))
    assert found_RD[2].isnan().nonzero().flatten().tolist() == list(range(256, 300))
    assert torch.equal(found_RD[1], x_RD[1])


def test_every_width_is_known_from_the_bytes() -> None:
    for width in range(1, 700):
        bytes_1B = encode(torch.ones(1, width))
        assert bytes_1B.shape[1] == width + (width + 127) // 128
        assert torch.equal(decode(bytes_1B, torch.float32), torch.ones(1, width))


def copies() -> Gather:
    """Return how rows 2, 0, 2 are taken from three; the gradient adds them up."""
    index_R = torch.tensor([2, 0, 2])
    return Gather(
        index_R, lambda grad_RD: grad_RD.new_zeros(3, grad_RD.shape[1]).index_add(0, index_R, grad_RD)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.deepseek, Recompute.core])
def test_gradients_pass_as_if_rows_were_numbers(dtype: torch.dtype, recompute: Recompute) -> None:
    results = []
    for wire in (NumberWire(recompute), Fp8Wire(recompute)):
        x_TD = wide_range(3, 160, dtype, 2).requires_grad_()
        with saving(recompute):
            rows_RD = wire.unpack(wire.gather(wire.pack(x_TD, top_k=3), copies()), copies())
            (rows_RD * torch.arange(1.0, 4.0)[:, None].to(dtype)).sum().backward()
        results.append((rows_RD.detach(), x_TD.grad))
    (numbers_RD, expected), (coded_RD, ours) = results
    assert torch.equal(ours, expected)
    assert torch.equal(coded_RD, decode(encode(numbers_RD), dtype))
    assert coded_RD.dtype == dtype


def test_shells_take_no_memory_and_bytes_no_gradient() -> None:
    like = torch.randn(3, 160, dtype=torch.bfloat16)
    assert shell(1000, like).shape == (1000, 160)
    assert shell(1000, like).untyped_storage().nbytes() == 2
    assert shell(0, like).shape == (0, 160)
    shell_TD, bytes_TB = Fp8Wire().pack(like.requires_grad_(), top_k=1)
    assert shell_TD.requires_grad
    assert not bytes_TB.requires_grad
    assert shell_TD.untyped_storage().nbytes() == 2


def test_what_is_recomputed_is_kept_as_bytes() -> None:
    """Behind an exchange only the bytes that arrived are kept, not the rows that the experts want."""
    like = torch.randn(64, 256, dtype=torch.bfloat16)
    wire = Fp8Wire(Recompute.deepseek)
    how = Gather(torch.arange(64).repeat(3), lambda grad_RD: grad_RD.view(3, 64, 256).sum(0))
    with LiveBytes() as live, saving(Recompute.deepseek):
        payload = (shell(64, like).requires_grad_(), encode(like))
        weight_D = torch.ones(256, dtype=torch.bfloat16, requires_grad=True)
        total = (wire.unpack(payload, how) * weight_D).sum()
    live.forget(like, total, weight_D)
    assert live.num_bytes < 64 * 258 + 2048
    total.backward()
    assert weight_D.grad is not None
    expected_D = decode(payload[1], torch.bfloat16).float().sum(0) * 3
    torch.testing.assert_close(weight_D.grad.float(), expected_D, rtol=2e-2, atol=0.5)


def test_ways_turn_round() -> None:
    assert Trip(there=Way.shape).turned() == Trip(back=Way.shape)
    assert [trip.turned() for trip in Fp8Wire.combined] == [Trip(there=Way.codes)]


def test_gathering_is_a_gather_both_ways() -> None:
    x_RD = torch.randn(3, 4, requires_grad=True)
    gather(x_RD, copies()).backward(torch.ones(3, 4))
    assert x_RD.grad is not None
    assert x_RD.grad[:, 0].tolist() == [1, 0, 2]


def test_rows_without_tokens() -> None:
    wire, nothing = Fp8Wire(), torch.empty(0, dtype=torch.int64)
    how = Gather(nothing, lambda grad_RD: grad_RD)
    x_TD = torch.empty(0, 160, dtype=torch.bfloat16, requires_grad=True)
    rows_RD = wire.unpack(wire.gather(wire.pack(x_TD, top_k=1), how), how)
    assert rows_RD.shape == (0, 160)
    rows_RD.sum().backward()
    assert x_TD.grad is not None
