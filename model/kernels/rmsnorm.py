"""RMSNorm."""

from torch import Tensor

from model.kernels import reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; any [..., D], type of x."""
    return reference.rms_norm(x_TD, weight_D, eps=eps)
