"""The attention core: the seam between MLA's projections and whatever computes the attention itself.

MLA hands the core the compressed memory of its own tokens. `gather` returns the memory that the queries may
look at (on one device the same), MLA expands it to keys and values, and `attend` does the softmax. Splitting
the sequence therefore moves only kv_lora_rank + rope numbers per token.

Legend: B sequences, S queries, M keys, H heads, K query and key width, U value width, C latent width,
P rotary width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kernels.attention import causal_attention


@dataclass(frozen=True)
class Memory:
    """What MLA keeps of each token: the normalised latent and the rotated shared key part.

    latent_BMC, k_rope_BMP in the compute type; positions_BM int64, the place of each token in its sequence.
    """

    latent_BMC: Tensor
    k_rope_BMP: Tensor
    positions_BM: Tensor


class AttentionCore(Protocol):
    """Causal attention over a memory that may be larger than the local tokens."""

    def gather(self, memory: Memory) -> Memory:
        """Return the memory of every token that the local queries may look at."""
        ...

    def attend(
        self,
        q_BSHK: Tensor,
        k_BMHK: Tensor,
        v_BMHU: Tensor,
        *,
        q_positions_BS: Tensor,
        k_positions_BM: Tensor,
        scale: float,
    ) -> Tensor:
        """Return softmax(scale q k^T) v over the keys not after the query's position; [B, S, H, U]."""
        ...


class LocalAttention:
    """All tokens on one device, at increasing positions, so that the order alone decides what is visible."""

    def gather(self, memory: Memory) -> Memory:
        """Return the memory itself."""
        return memory

    def attend(
        self,
        q_BSHK: Tensor,
        k_BMHK: Tensor,
        v_BMHU: Tensor,
        *,
        q_positions_BS: Tensor,
        k_positions_BM: Tensor,
        scale: float,
    ) -> Tensor:
        """Return the causal attention of q over k and v; [B, S, H, U]."""
        # the same tensor means the same tokens: no comparison of values, which would wait for the device
        if q_positions_BS is k_positions_BM:
            return causal_attention(q_BSHK, k_BMHK, v_BMHU, scale=scale)
        return attention_by_position(
            q_BSHK, k_BMHK, v_BMHU, q_positions_BS=q_positions_BS, k_positions_BM=k_positions_BM, scale=scale
        )


def attention_by_position(
    q_BSHK: Tensor,
    k_BMHK: Tensor,
    v_BMHU: Tensor,
    *,
    q_positions_BS: Tensor,
    k_positions_BM: Tensor,
    scale: float,
) -> Tensor:
    """Return attention masked by explicit positions, softmax in FP32; [B, S, H, U], type of q.

    For queries and keys that are not the same tokens; it holds the S x M scores in memory.
    """
    scores_BHSM = torch.einsum("bshk,bmhk->bhsm", q_BSHK, k_BMHK).float() * scale
    future_BSM = k_positions_BM[:, None, :] > q_positions_BS[:, :, None]
    probs_BHSM = scores_BHSM.masked_fill(future_BSM[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhsm,bmhu->bshu", probs_BHSM.to(v_BMHU.dtype), v_BMHU)
