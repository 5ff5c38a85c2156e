"""SwiGLU."""

from torch import Tensor

from model.kernels import reference


def swiglu(gate_TI: Tensor, up_TI: Tensor, row_weights_T: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, each row scaled by its weight if weights are given; any [..., I], type of gate."""
    return reference.swiglu(gate_TI, up_TI, row_weights_T).to(gate_TI.dtype)
