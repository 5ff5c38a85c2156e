"""Causal attention as blocked batched GEMMs with a hand-written backward pass.

Rows are taken in blocks; a block of queries sees only its causal prefix of keys, so that about half of the
score matrix is never computed. Heads are taken in groups small enough that a block of scores stays in cache.
Only q, k and v are kept for the backward pass: probabilities are computed again, and the softmax gradient
P * (dP - rowsum(P * dP)) needs neither the output nor the log-sum-exp (FlashAttention, arXiv 2205.14135,
appendix B.4, rewritten for whole rows). GEMM inputs and probabilities have the type of q; softmax is FP32
inside.

Queries and keys may be wider than values, as in multi-head latent attention (arXiv 2405.04434, section 2.1).
Queries may be the last part of a sequence, whose keys and values are then those of the whole sequence.

Legend: B sequences, S queries, M keys, H heads, K query/key width, U value width, N = B * H; G (sequence,
head) pairs of one group, Q rows of one block of queries, J keys of its causal prefix.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_BLOCK_ROWS = 128
MAX_BLOCK_ROWS = 512
FEW_BLOCKS = 8
"""Up to this many blocks: gradients of k and v are summed in the compute type, beyond it in FP32."""
GROUP_BYTES = 2 << 20
"""Target size of the scores of one group of heads and one block of rows."""


def causal_attention(
    q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, *, scale: float, first: int = 0
) -> Tensor:
    """Return softmax(scale * q k^T + causal mask) v, shape [B, S, H, U], type of q.

    q: [B, S, H, K], positions first .. first + S - 1 of the sequences; k: [B, M, H, K] and v: [B, M, H, U],
    their positions 0 .. M - 1; any of FP32, BF16, FP16, all alike. Position i attends to 0..i. Tensors that
    are not on the CPU go to torch's scaled_dot_product_attention. Raises ValueError unless M = first + S.
    """
    if k_BMHK.shape[1] != first + q_BSHK.shape[1]:
        raise ValueError(
            f"{q_BSHK.shape[1]} queries from position {first} on need {first + q_BSHK.shape[1]} keys, "
            f"not {k_BMHK.shape[1]}"
        )
    if q_BSHK.device.type != "cpu":
        return _torch_attention(q_BSHK, k_BMHK, v_BMHU, scale=scale)
    return _CausalAttention.apply(q_BSHK, k_BMHK, v_BMHU, scale)


def _torch_attention(q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, *, scale: float) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler: over a second a process

    whole = q_BSHK.shape[1] == k_BMHK.shape[1]
    out_BHSU = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BMHK.transpose(1, 2),
        v_BMHU.transpose(1, 2),
        # the last query sees the last key: torch's `is_causal` would align the first ones
        attn_mask=None if whole else causal_lower_right(q_BSHK.shape[1], k_BMHK.shape[1]),
        is_causal=whole,
        scale=scale,
    )
    return out_BHSU.transpose(1, 2)


@dataclass(frozen=True)
class _Tiling:
    """How the scores [N, S, M] are cut: blocks of rows, groups of (sequence, head) pairs."""

    block_rows: int
    group_heads: int

    def row_blocks(self, length: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.block_rows, length)) for start in range(0, length, self.block_rows)]


def _tiling(q_BSHK: Tensor, k_BMHK: Tensor) -> _Tiling:
    batch, length, heads, _ = q_BSHK.shape
    wanted = -(-length // FEW_BLOCKS)
    block_rows = min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, -(-wanted // 64) * 64))
    block_scores = min(block_rows, length) * k_BMHK.shape[1]
    group_heads = max(1, GROUP_BYTES // (block_scores * q_BSHK.element_size()))
    return _Tiling(block_rows=block_rows, group_heads=min(batch * heads, group_heads))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BSHK, k_BMHK, v_BMHU)
        ctx.scale = scale
        return torch.ops.fathom.causal_attention(q_BSHK, k_BMHK, v_BMHU, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dq, dk, dv = torch.ops.fathom.causal_attention_gradients(*ctx.saved_tensors, grads[0], ctx.scale)
        return dq, dk, dv, None


# Both passes are operations that torch knows by name. Whoever watches operations, as a dry run does, sees one
# for each pass, with shapes but without blocks, whatever a device does inside.
torch.library.define(
    "fathom::causal_attention", "(Tensor q_BSHK, Tensor k_BMHK, Tensor v_BMHU, float scale) -> Tensor"
)
torch.library.define(
    "fathom::causal_attention_gradients",
    "(Tensor q_BSHK, Tensor k_BMHK, Tensor v_BMHU, Tensor dout_BSHU, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fathom::causal_attention", "cpu")
def _attention(q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, scale: float) -> Tensor:
    batch, length, heads, _ = q_BSHK.shape
    before = k_BMHK.shape[1] - length  # the keys that every query sees
    q_NSK, k_NMK, v_NMU = _head_major(q_BSHK), _head_major(k_BMHK), _head_major(v_BMHU)
    tiling = _tiling(q_BSHK, k_BMHK)
    out_NSU = v_NMU.new_empty(batch * heads, length, v_NMU.shape[2])
    for first in range(0, batch * heads, tiling.group_heads):
        part = slice(first, first + tiling.group_heads)
        for start, end in tiling.row_blocks(length):
            prefix = slice(before + end)
            k_GJK, v_GJU = k_NMK[part, prefix].contiguous(), v_NMU[part, prefix].contiguous()
            p_GQJ = _probabilities(q_NSK[part, start:end], k_GJK, before + start, scale)
            torch.bmm(p_GQJ, v_GJU, out=out_NSU[part, start:end])
    return out_NSU.view(batch, heads, length, -1).transpose(1, 2).contiguous()


@torch.library.register_fake("fathom::causal_attention")
def _attention_shape(q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, scale: float) -> Tensor:
    return v_BMHU.new_empty(*q_BSHK.shape[:3], v_BMHU.shape[3])


@torch.library.impl("fathom::causal_attention_gradients", "cpu")
def _gradients(
    q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, dout_BSHU: Tensor, scale: float
) -> tuple[Tensor, ...]:
    batch, length, heads, _ = q_BSHK.shape
    q_NSK, k_NMK, v_NMU = _head_major(q_BSHK), _head_major(k_BMHK), _head_major(v_BMHU)
    dout_NSU = _head_major(dout_BSHU)
    tiling = _tiling(q_BSHK, k_BMHK)
    grads = [torch.empty_like(x) for x in (q_NSK, k_NMK, v_NMU)]
    for first in range(0, batch * heads, tiling.group_heads):
        part = slice(first, first + tiling.group_heads)
        dq_GSK, dk_GMK, dv_GMU = (grad[part] for grad in grads)
        _group_gradients(
            (q_NSK[part], k_NMK[part], v_NMU[part], dout_NSU[part]),
            (dq_GSK, dk_GMK, dv_GMU),
            tiling.row_blocks(length),
            scale,
        )
    return tuple(grad.view(batch, heads, grad.shape[1], -1).transpose(1, 2) for grad in grads)


@torch.library.register_fake("fathom::causal_attention_gradients")
def _gradient_shapes(
    q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor, dout_BSHU: Tensor, scale: float
) -> tuple[Tensor, ...]:
    # as they really lie: heads before tokens
    like = (x_BXHX.transpose(1, 2) for x_BXHX in (q_BSHK, k_BMHK, v_BMHU))
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format).transpose(1, 2) for x in like)


def _group_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    blocks: list[tuple[int, int]],
    scale: float,
) -> None:
    """Write dq, dk, dv of one group of heads, from the last block of rows, which sees every key."""
    q_GSK, k_GMK, v_GMU, dout_GSU = inputs
    dq_GSK, dk_GMK, dv_GMU = grads
    before = k_GMK.shape[1] - q_GSK.shape[1]
    few = len(blocks) <= FEW_BLOCKS or k_GMK.dtype == torch.float64
    sum_dk_GMK = dk_GMK if few else torch.zeros_like(dk_GMK, dtype=torch.float32)
    sum_dv_GMU = dv_GMU if few else torch.zeros_like(dv_GMU, dtype=torch.float32)
    for start, end in reversed(blocks):
        prefix = slice(before + end)
        q_GQK, dout_GQU = q_GSK[:, start:end], dout_GSU[:, start:end]
        # contiguous prefixes: batched GEMMs take up to twice as long on strided ones
        k_GJK, v_GJU = k_GMK[:, prefix].contiguous(), v_GMU[:, prefix].contiguous()
        p_GQJ = _probabilities(q_GQK, k_GJK, before + start, scale)
        dp_GQJ = torch.bmm(dout_GQU, v_GJU.transpose(1, 2))
        ds_GQJ = torch.ops.aten._softmax_backward_data(dp_GQJ, p_GQJ, -1, dp_GQJ.dtype)
        dq_GQK = dq_GSK[:, start:end]
        torch.baddbmm(dq_GQK, ds_GQJ, k_GJK, beta=0, alpha=scale, out=dq_GQK)
        if few:
            beta = 0 if end == q_GSK.shape[1] else 1
            dk_GMK[:, prefix].baddbmm_(ds_GQJ.transpose(1, 2), q_GQK, beta=beta, alpha=scale)
            dv_GMU[:, prefix].baddbmm_(p_GQJ.transpose(1, 2), dout_GQU, beta=beta)
        else:
            sum_dk_GMK[:, prefix].add_(torch.bmm(ds_GQJ.transpose(1, 2), q_GQK), alpha=scale)
            sum_dv_GMU[:, prefix].add_(torch.bmm(p_GQJ.transpose(1, 2), dout_GQU))
    if not few:
        dk_GMK.copy_(sum_dk_GMK)
        dv_GMU.copy_(sum_dv_GMU)


def _probabilities(q_GQK: Tensor, k_GJK: Tensor, start: int, scale: float) -> Tensor:
    """Return the causal softmax [G, Q, J] of the query rows that begin at position `start`."""
    rows, prefix = q_GQK.shape[1], k_GJK.shape[1]
    mask_QJ = q_GQK.new_full((rows, prefix), float("-inf")).triu_(start + 1)
    return torch.softmax(torch.baddbmm(mask_QJ, q_GQK, k_GJK.transpose(1, 2), alpha=scale), -1)


def _head_major(x_BSHK: Tensor) -> Tensor:
    """Return [B * H, S, K], contiguous: the layout in which batched GEMMs run without copies."""
    batch, length, heads, width = x_BSHK.shape
    return x_BSHK.transpose(1, 2).reshape(batch * heads, length, width).contiguous()
