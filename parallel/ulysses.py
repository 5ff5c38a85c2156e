"""Context parallelism by exchanging tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank expands queries, keys and values of its own part of the sequence only. One all-to-all then gives it
all tokens for a part of the heads, attention runs over the whole sequence as on one device, and a second
all-to-all brings the outputs back. What travels grows with heads and shrinks with cp, whereas gathering MLA's
latents (`parallel/context.py`) moves the same few numbers per token to everyone, and every rank expands all
of them. Attention runs as one kernel of full length; cp has to divide the heads of a tp rank.

Where the attention itself is recomputed (`core`), the exchange is repeated with it.

Legend: B sequences, S tokens of this part of cp, M = cp * S tokens of the sequence, H heads of this tp rank,
h = H / cp heads after the exchange, N ranks of cp, K query and key width, U value width, X any width.
"""

import torch
from torch import Tensor

from model.attention import Memory
from model.kernels.attention import causal_attention
from parallel.collectives import exchange
from parallel.context import gather_memory, in_part_order, in_sequence_order, split_context
from parallel.groups import Group


class UlyssesAttention:
    """`model.attention.AttentionCore` for the same spread of tokens as `parallel.context.GatheredAttention`.

    Args:
        tp: the ranks among which the heads, and the tokens of a part, are spread.
        cp: the ranks among which the parts of a sequence are spread; their number divides H.
    """

    def __init__(self, tp: Group, cp: Group) -> None:
        self._tp, self._cp = tp, cp

    def gather(self, memory: Memory) -> Memory:
        """Return the memory of this part of the sequence, [B, S, ...], in the order of its two chunks."""
        if self._tp.size == 1:
            return memory
        latent_BSC, k_rope_BSP = gather_memory(memory, self._tp)
        whole_M = torch.arange(self._cp.size * latent_BSC.shape[1], device=latent_BSC.device)
        positions_S = split_context(whole_M, dim=0, group=self._cp)
        return Memory(latent_BSC, k_rope_BSP, positions_S.expand(len(latent_BSC), -1))

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
        """Return the causal attention of this part's tokens over the whole sequence; [B, S, H, U].

        Keys and values are those of this part as well. Positions follow from the order of tokens and are not
        looked at.
        """
        if self._cp.size == 1:
            return causal_attention(q_BSHK, k_BMHK, v_BMHU, scale=scale)
        widths = (q_BSHK.shape[-1], k_BMHK.shape[-1], v_BMHU.shape[-1])
        joined_BMhX = self._to_heads(torch.cat((q_BSHK, k_BMHK, v_BMHU), dim=-1))
        q_BMhK, k_BMhK, v_BMhU = joined_BMhX.split(widths, dim=-1)
        return self._to_tokens(causal_attention(q_BMhK, k_BMhK, v_BMhU, scale=scale))

    def _to_heads(self, x_BSHX: Tensor) -> Tensor:
        """Return all tokens [B, M, h, X], by increasing position, of this rank's part of the heads."""
        x_NSBhX = x_BSHX.unflatten(2, (self._cp.size, -1)).permute(2, 1, 0, 3, 4)
        x_MBhX = exchange(x_NSBhX.flatten(0, 1), self._cp)
        return in_sequence_order(x_MBhX.transpose(0, 1), self._cp.size)

    def _to_tokens(self, x_BMhX: Tensor) -> Tensor:
        """Return this part's tokens [B, S, H, X] of all heads; undoes `_to_heads`."""
        x_MBhX = in_part_order(x_BMhX, self._cp.size).transpose(0, 1)
        x_NSBhX = exchange(x_MBhX, self._cp).unflatten(0, (self._cp.size, -1))
        return x_NSBhX.permute(2, 1, 0, 3, 4).flatten(2, 3)
