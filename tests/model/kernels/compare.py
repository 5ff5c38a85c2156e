"""Comparing a kernel with its plain reference, gradients included."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest error allowed, relative to the largest magnitude of the tensor that is compared."""


def relative_error(actual: Tensor, expected: Tensor, *, floor: float = 1e-30) -> float:
    """Return max |actual - expected| / max |expected|, the divisor at least `floor`."""
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp(min=floor)
    return (actual.double() - expected.double()).abs().max().div(scale).item()


def check_against_reference(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Compare outputs and the gradients of all inputs; the reference runs in FP64 on the same values."""
    mine = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    exact = [x.detach().double().requires_grad_(x.is_floating_point()) for x in inputs]
    out, expected = kernel(*mine), reference(*exact)
    assert out.shape == expected.shape
    tolerance = TOLERANCE[inputs[0].dtype]
    assert relative_error(out, expected) <= tolerance, "output"
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    for index, (x, y) in enumerate(zip(mine, exact, strict=True)):
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.dtype == x.dtype
        # a gradient that cancels to nothing is as exact as the terms that it is a sum of
        assert relative_error(x.grad, y.grad, floor=1e-2) <= tolerance, f"gradient of input {index}"
