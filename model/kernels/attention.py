"""Causal attention as blocked batched GEMMs with a hand-written backward pass.

Rows are taken in blocks; a block of queries sees only its causal prefix of keys, so that about half of the
score matrix is never computed. Heads are taken in groups small enough that a block of scores stays in cache.
Only q, k and v are kept for the backward pass: probabilities are computed again, and the softmax gradient
P * (dP - rowsum(P * dP)) needs neither the output nor the log-sum-exp (FlashAttention, arXiv 2205.14135,
appendix B.4, rewritten for whole rows). GEMM inputs and probabilities have the type of q; softmax is FP32
inside.

Queries and keys may be wider than values, as in multi-head latent attention (arXiv 2405.04434, section 2.1).

Legend: B sequences, S length, H heads, K query/key width, U value width, G (sequence, head) pairs of one
group, Q rows of one block of queries, J keys of its causal prefix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MIN_BLOCK_ROWS = 128
MAX_BLOCK_ROWS = 512
FEW_BLOCKS = 8
"""Up to this many blocks: gradients of k and v are summed in the compute type, beyond it in FP32."""
GROUP_BYTES = 2 << 20
"""Target size of the scores of one group of heads and one block of rows."""


def causal_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHU: Tensor, *, scale: float) -> Tensor:
    """Return softmax(scale * q k^T + causal mask) v, shape [B, S, H, U], type of q.

    q, k: [B, S, H, K]; v: [B, S, H, U]; any of FP32, BF16, FP16, all alike. Position i attends to 0..i.
    Tensors that are not on the CPU go to torch's scaled_dot_product_attention.
    """
    if q_BSHK.device.type != "cpu":
        out_BHSU = F.scaled_dot_product_attention(
            q_BSHK.transpose(1, 2),
            k_BSHK.transpose(1, 2),
            v_BSHU.transpose(1, 2),
            is_causal=True,
            scale=scale,
        )
        return out_BHSU.transpose(1, 2)
    return _CausalAttention.apply(q_BSHK, k_BSHK, v_BSHU, scale)


@dataclass(frozen=True)
class _Tiling:
    """How the scores [G_total, S, S] are cut: blocks of rows, groups of (sequence, head) pairs."""

    block_rows: int
    group_heads: int

    def row_blocks(self, length: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.block_rows, length)) for start in range(0, length, self.block_rows)]


def _tiling(length: int, num_heads: int, element_bytes: int) -> _Tiling:
    wanted = -(-length // FEW_BLOCKS)
    block_rows = min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, -(-wanted // 64) * 64))
    group_heads = max(1, GROUP_BYTES // (min(block_rows, length) * length * element_bytes))
    return _Tiling(block_rows=block_rows, group_heads=min(num_heads, group_heads))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q_BSHK: Tensor, k_BSHK: Tensor, v_BSHU: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BSHK, k_BSHK, v_BSHU)
        ctx.scale = scale  # type: ignore[attr-defined]
        batch, length, heads, _ = q_BSHK.shape
        q_NSK, k_NSK, v_NSU = _head_major(q_BSHK), _head_major(k_BSHK), _head_major(v_BSHU)
        tiling = _tiling(length, batch * heads, q_BSHK.element_size())
        out_NSU = torch.empty_like(v_NSU)
        for first in range(0, batch * heads, tiling.group_heads):
            part = slice(first, first + tiling.group_heads)
            for start, end in tiling.row_blocks(length):
                k_GJK, v_GJU = k_NSK[part, :end].contiguous(), v_NSU[part, :end].contiguous()
                p_GQJ = _probabilities(q_NSK[part, start:end], k_GJK, start, scale)
                torch.bmm(p_GQJ, v_GJU, out=out_NSU[part, start:end])
        return out_NSU.view(batch, heads, length, -1).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (dout_BSHU,) = grads
        q_BSHK, k_BSHK, v_BSHU = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        batch, length, heads, _ = q_BSHK.shape
        q_NSK, k_NSK, v_NSU = _head_major(q_BSHK), _head_major(k_BSHK), _head_major(v_BSHU)
        dout_NSU = _head_major(dout_BSHU)
        tiling = _tiling(length, batch * heads, q_BSHK.element_size())
        dq_NSK, dk_NSK, dv_NSU = torch.empty_like(q_NSK), torch.empty_like(k_NSK), torch.empty_like(v_NSU)
        for first in range(0, batch * heads, tiling.group_heads):
            part = slice(first, first + tiling.group_heads)
            _group_gradients(
                (q_NSK[part], k_NSK[part], v_NSU[part], dout_NSU[part]),
                (dq_NSK[part], dk_NSK[part], dv_NSU[part]),
                tiling.row_blocks(length),
                scale,
            )
        dq, dk, dv = (
            grad.view(batch, heads, length, -1).transpose(1, 2) for grad in (dq_NSK, dk_NSK, dv_NSU)
        )
        return dq, dk, dv, None


def _group_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    blocks: list[tuple[int, int]],
    scale: float,
) -> None:
    """Write dq, dk, dv of one group of heads, from the last block of rows, which sees every key."""
    q_GSK, k_GSK, v_GSU, dout_GSU = inputs
    dq_GSK, dk_GSK, dv_GSU = grads
    few = len(blocks) <= FEW_BLOCKS or k_GSK.dtype == torch.float64
    sum_dk_GSK = dk_GSK if few else torch.zeros_like(dk_GSK, dtype=torch.float32)
    sum_dv_GSU = dv_GSU if few else torch.zeros_like(dv_GSU, dtype=torch.float32)
    for start, end in reversed(blocks):
        q_GQK, dout_GQU = q_GSK[:, start:end], dout_GSU[:, start:end]
        # contiguous prefixes: batched GEMMs take up to twice as long on strided ones
        k_GJK, v_GJU = k_GSK[:, :end].contiguous(), v_GSU[:, :end].contiguous()
        p_GQJ = _probabilities(q_GQK, k_GJK, start, scale)
        dp_GQJ = torch.bmm(dout_GQU, v_GJU.transpose(1, 2))
        ds_GQJ = torch.ops.aten._softmax_backward_data(dp_GQJ, p_GQJ, -1, dp_GQJ.dtype)
        dq_GQK = dq_GSK[:, start:end]
        torch.baddbmm(dq_GQK, ds_GQJ, k_GJK, beta=0, alpha=scale, out=dq_GQK)
        if few:
            beta = 0 if end == k_GSK.shape[1] else 1
            dk_GSK[:, :end].baddbmm_(ds_GQJ.transpose(1, 2), q_GQK, beta=beta, alpha=scale)
            dv_GSU[:, :end].baddbmm_(p_GQJ.transpose(1, 2), dout_GQU, beta=beta)
        else:
            sum_dk_GSK[:, :end].add_(torch.bmm(ds_GQJ.transpose(1, 2), q_GQK), alpha=scale)
            sum_dv_GSU[:, :end].add_(torch.bmm(p_GQJ.transpose(1, 2), dout_GQU))
    if not few:
        dk_GSK.copy_(sum_dk_GSK)
        dv_GSU.copy_(sum_dv_GSU)


def _probabilities(q_GQK: Tensor, k_GJK: Tensor, start: int, scale: float) -> Tensor:
    """Return the causal softmax [G, Q, J] of the query rows that begin at position `start`."""
    rows, prefix = q_GQK.shape[1], k_GJK.shape[1]
    mask_QJ = q_GQK.new_full((rows, prefix), float("-inf")).triu_(start + 1)
    return torch.softmax(torch.baddbmm(mask_QJ, q_GQK, k_GJK.transpose(1, 2), alpha=scale), -1)


def _head_major(x_BSHK: Tensor) -> Tensor:
    """Return [B * H, S, K], contiguous: the layout in which batched GEMMs run without copies."""
    batch, length, heads, width = x_BSHK.shape
    return x_BSHK.transpose(1, 2).reshape(batch * heads, length, width).contiguous()
