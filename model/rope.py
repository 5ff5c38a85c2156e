"""Rotary position embedding and its YaRN extension (arXiv 2104.09864, arXiv 2309.00071).

Every pair of channels (x0, x1), (x2, x3), ... of the decoupled rotary part is rotated by the angle
position * inverse frequency. YaRN stretches the slow frequencies by `factor`, leaves the fast ones, ramps
between the two, and sharpens the attention by mscale^2. The setting acts as soon as it is given, also while
sequences are still as long as the original ones: a model must see one rotation per training stage.

Legend: B sequences, S length, H heads, P rotary width, F = P / 2 frequencies.
"""

import math

import torch
from torch import Tensor, nn

from model.config import AttentionConfig, YarnConfig
from model.kernels.rope import rotate


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(attention: AttentionConfig, yarn: YarnConfig | None) -> float:
    """Return the factor of q k^T: (nope + rope width)^-0.5, times mscale_all^2 under YaRN."""
    scale = (attention.qk_nope_head_dim + attention.qk_rope_head_dim) ** -0.5
    return scale if yarn is None else scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def table_scale(yarn: YarnConfig | None) -> float:
    """Return the factor on cos and sin: mscale / mscale_all, which is 1 in V3.

    A zero among the two weights means "not given": the factor is then the paper's 0.1 ln(factor) + 1.
    """
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def inverse_frequencies(attention: AttentionConfig, yarn: YarnConfig | None) -> Tensor:
    """Return the angle per position of each pair, FP32 [F], radians (YaRN: arXiv 2309.00071, section 3.2)."""
    width, theta = attention.qk_rope_head_dim, attention.rope_theta
    powers_F = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    plain_F = 1.0 / powers_F
    if yarn is None:
        return plain_F
    low = max(math.floor(_pair_of_rotations(yarn.beta_fast, attention, yarn)), 0)
    high = min(math.ceil(_pair_of_rotations(yarn.beta_slow, attention, yarn)), width - 1)
    span = high - low if high != low else 0.001  # the ramp becomes a step instead of a division by zero
    ramp_F = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep_F, stretched_F = 1 - ramp_F, 1.0 / (yarn.factor * powers_F)
    # 1 - keep, not ramp: the released tables are computed so, and rounding would differ
    return stretched_F * (1 - keep_F) + plain_F * keep_F


def _pair_of_rotations(rotations: float, attention: AttentionConfig, yarn: YarnConfig) -> float:
    # the (fractional) pair that turns `rotations` times within the original length
    length = yarn.original_length / (rotations * 2 * math.pi)
    return attention.qk_rope_head_dim * math.log(length) / (2 * math.log(attention.rope_theta))


class RotaryEmbedding(nn.Module):
    """The rotation table of a batch, computed once per forward pass and shared by all layers."""

    inv_freq: Tensor

    def __init__(self, attention: AttentionConfig, yarn: YarnConfig | None) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("inv_freq", torch.empty(attention.qk_rope_head_dim // 2), persistent=False)
        self.set_yarn(yarn)

    def set_yarn(self, yarn: YarnConfig | None) -> None:
        """Switch to another rotation setting; None is plain RoPE."""
        # computed on the CPU whatever the default device, so that every device has the same table
        with torch.device("cpu"):
            inv_freq_F = inverse_frequencies(self.attention, yarn)
        self.inv_freq = inv_freq_F.to(self.inv_freq.device)
        self.scale = table_scale(yarn)

    def forward(self, positions_BS: Tensor) -> Tensor:
        """Return table_BS2F in FP32: cos in [:, :, 0], sin in [:, :, 1]."""
        angles_BSF = positions_BS[..., None].float() * self.inv_freq
        return torch.stack((angles_BSF.cos(), angles_BSF.sin()), dim=2) * self.scale


def apply_rope(x_BSHP: Tensor, table_BS2F: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x by the table; shape and type of x."""
    return rotate(x_BSHP, table_BS2F)
