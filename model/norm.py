"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
from torch import Tensor, nn

from model.kernels.rmsnorm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; FP32 weight, output of the type of x."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, shape and type of x [..., width]."""
        return rms_norm(x, self.weight, eps=self.eps)
