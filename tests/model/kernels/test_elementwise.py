"""SwiGLU, RMSNorm and rotation against their plain versions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import blocks, reference
from model.kernels.rmsnorm import rms_norm
from model.kernels.rope import rotate
from model.kernels.swiglu import swiglu
from tests.model.kernels.compare import TOLERANCE, check_against_reference, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1 << 16, 100], ids=["one block", "many blocks"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 40), (2, 5, 12), (1, 1), (3, 300)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]):
    check_against_reference(
        swiglu, reference.swiglu, [random(0, *shape, dtype=dtype), random(1, *shape, dtype=dtype)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("shape", [(17, 40), (2, 5, 12), (1, 1), (3, 300)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]):
    weight = random(3, shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight, eps=1e-3)

    check_against_reference(
        lambda x, w: rms_norm(x, w, eps=1e-3), plain, [random(2, *shape, dtype=dtype), weight]
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.floats(1e-8, 1.0), st.floats(1e-3, 1e3))
def test_rms_norm_any_shape_and_magnitude(rows: int, width: int, eps: float, magnitude: float):
    inputs = [random(rows, rows, width) * magnitude, random(width, width)]
    check_against_reference(
        lambda x, w: rms_norm(x, w, eps=eps), lambda x, w: reference.rms_norm(x, w, eps=eps), inputs
    )


def test_non_contiguous_inputs():
    x = random(0, 6, 40)
    gate, up = x[:, :20], x[:, 20:]
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    weight = torch.ones(20)
    assert torch.equal(rms_norm(up, weight, eps=1e-6), rms_norm(up.contiguous(), weight, eps=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_batch", [1, 2])
def test_rotate(dtype: torch.dtype, table_batch: int):
    angles = random(4, table_batch, 9, 6).mul(3)
    table = torch.stack((angles.cos(), angles.sin()), dim=2)
    table = table.double() if dtype == torch.float64 else table
    x = random(5, 2, 9, 3, 12, dtype=dtype)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = rotate(mine, table), reference.rotate(exact, table.double())
    grad = random(6, *x.shape, dtype=dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert mine.grad is not None
    assert exact.grad is not None
    assert out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    assert relative_error(mine.grad, exact.grad) <= TOLERANCE[dtype]


def test_rotate_a_slice_leaves_its_input_alone():
    angles = random(4, 1, 5, 4)
    table = torch.stack((angles.cos(), angles.sin()), dim=2)
    x = random(5, 1, 5, 2, 20)
    before = x.clone()
    out = rotate(x[..., 12:], table)
    assert torch.equal(x, before)
    assert torch.allclose(out, reference.rotate(x[..., 12:], table), atol=1e-6)
