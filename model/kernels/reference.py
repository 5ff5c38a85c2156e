"""Plain torch version of every kernel: the definition that the fast ones are tested against.

Nothing here is written for speed; autograd derives every gradient. Arithmetic is FP32 unless the inputs are
FP64 (the tests compare in FP64 where a finite difference is taken).

Legend: B sequences, S length, M keys, H heads, K query/key width, U value width, T tokens, D hidden,
V vocabulary, E experts, I expert intermediate, R routed rows (sorted by expert), A experts per token,
P rotary width, F = P / 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, *, scale: float, first: int = 0
) -> Tensor:
    """Return softmax(scale * q k^T + causal mask) v, shape [B, S, H, U]; the queries begin at `first`."""
    q_BSHK, k_BMHK, v_BMHU = _at_least_fp32(q_BSHK), _at_least_fp32(k_BMHK), _at_least_fp32(v_BMHU)
    scores_BHSM = torch.einsum("bqhk,bmhk->bhqm", q_BSHK, k_BMHK) * scale
    future_SM = torch.ones(scores_BHSM.shape[2:], dtype=torch.bool, device=q_BSHK.device).triu(first + 1)
    probs_BHSM = scores_BHSM.masked_fill(future_SM, float("-inf")).softmax(-1)
    return torch.einsum("bhqm,bmhu->bqhu", probs_BHSM, v_BMHU)


def swiglu(gate_TI: Tensor, up_TI: Tensor, row_weights_T: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, each row scaled by its weight if weights are given; shape [T, I]."""
    out_TI = F.silu(_at_least_fp32(gate_TI)) * _at_least_fp32(up_TI)
    return out_TI if row_weights_T is None else out_TI * row_weights_T[:, None]


def expert_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    row_weights_R: Tensor,
) -> Tensor:
    """Return weight * (silu(x w1_e^T) * (x w3_e^T)) w2_e^T of each row x and its expert e, [R, D]."""
    outputs: list[Tensor] = []
    parts = zip(rows_RD.split(counts), row_weights_R.split(counts), strict=True)
    for expert, (rows_ND, weights_N) in enumerate(parts):
        hidden_NI = swiglu(rows_ND @ w1_EID[expert].T, rows_ND @ w3_EID[expert].T, weights_N)
        outputs.append(hidden_NI.to(rows_RD.dtype) @ w2_EDI[expert].T)
    return torch.cat(outputs)


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, shape of x, type of x."""
    wide_TD = _at_least_fp32(x_TD)
    normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (normed_TD * weight_D).to(x_TD.dtype)


def rotate(x_BSHP: Tensor, table_BS2F: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... by the angles whose cos and sin the table holds.

    table[:, :, 0] is cos, table[:, :, 1] is sin, FP32; returns the shape and type of x.
    """
    cos_BS1F, sin_BS1F = table_BS2F[:, :, :1], table_BS2F[:, :, 1:]
    even_BSHF, odd_BSHF = _at_least_fp32(x_BSHP[..., 0::2]), _at_least_fp32(x_BSHP[..., 1::2])
    pairs = torch.stack(
        (even_BSHF * cos_BS1F - odd_BSHF * sin_BS1F, even_BSHF * sin_BS1F + odd_BSHF * cos_BS1F), dim=-1
    )
    return pairs.flatten(-2).to(x_BSHP.dtype)


def permute(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """Return row token_R[r] of x as row r, shape [R, D]."""
    return x_TD[token_R]


def combine(rows_RD: Tensor, row_TA: Tensor) -> Tensor:
    """Return for each token the sum of its rows row_TA[t], summed in FP32, shape [T, D], type of rows."""
    return _at_least_fp32(rows_RD[row_TA]).sum(1).to(rows_RD.dtype)


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (sum_t weights_t * CE_t, CE_T detached) of logits hidden @ weight^T; label -100 has CE 0."""
    logits_TV = _at_least_fp32(hidden_TD) @ _at_least_fp32(weight_VD).T
    token_loss_T = F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="none")
    return (token_loss_T * weights_T).sum(), token_loss_T.detach()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
