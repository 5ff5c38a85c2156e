"""Rotary rotation of interleaved pairs."""

from torch import Tensor

from model.kernels import reference


def rotate(x_BSHP: Tensor, table_BS2F: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ...; table[:, :, 0] is cos, [:, :, 1] is sin, FP32."""
    return reference.rotate(x_BSHP, table_BS2F)
