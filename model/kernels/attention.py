"""Causal attention."""

from torch import Tensor

from model.kernels import reference


def causal_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHU: Tensor, *, scale: float) -> Tensor:
    """Return softmax(scale * q k^T + causal mask) v, shape [B, S, H, U], type of q."""
    return reference.causal_attention(q_BSHK, k_BSHK, v_BSHU, scale=scale).to(q_BSHK.dtype)
