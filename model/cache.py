"""The cache of multi-head latent attention: all that decoding must remember of a token.

A layer keeps, for each token, its normed key-value latent c (kv_lora_rank numbers) and the rotated key
part that all heads share (qk_rope_head_dim numbers): arXiv 2405.04434, section 2.1.2, where the others'
keys and values of every head would be 2 * num_heads * head_dim numbers. Both lie side by side in one
preallocated tensor per layer, so that one product with [absorbed query ; rotated query] gives the scores
and the first kv_lora_rank columns are the values (model/decode.py).

Sequences of a batch may have different lengths. Entries at and beyond a sequence's length are stale:
a query at position p sees the entries 0..p only, and whatever is written next replaces them. Taking
tokens back (a rejected draft) is therefore only a smaller length.

Shapes: B sequences, S new tokens, M memory slots read, C kv_lora_rank, P qk_rope_head_dim, X = C + P.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import AttentionConfig


class LatentCache:
    """Latents of `num_layers` attention layers for `num_sequences` sequences of up to `max_length` tokens."""

    def __init__(
        self,
        attention: AttentionConfig,
        *,
        num_layers: int,
        num_sequences: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        width = attention.kv_lora_rank + attention.qk_rope_head_dim
        shape = (num_sequences, max_length, width)
        self._memory_BMX = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._rows_B1 = torch.arange(num_sequences, device=device).unsqueeze(1)
        self.max_length = max_length
        self.lengths = [0] * num_sequences

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes preallocated, over all layers and sequences."""
        return sum(memory.nbytes for memory in self._memory_BMX)

    def next_positions(self, num_tokens: int) -> Tensor:
        """Return the positions [B, S] of the `num_tokens` tokens that come next in each sequence.

        Raises ValueError when they do not fit.
        """
        end = max(self.lengths) + num_tokens
        if end > self.max_length:
            raise ValueError(
                f"{num_tokens} more tokens after {max(self.lengths)} exceed the cache's max_length="
                f"{self.max_length}; build it for at least {end}"
            )
        device = self._rows_B1.device
        starts_B1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return starts_B1 + torch.arange(num_tokens, device=device)

    def write(self, layer: int, latent_BSC: Tensor, k_rope_BSP: Tensor, positions_BS: Tensor) -> None:
        """Store the entries of the tokens at `positions_BS`; lengths stay until `extend` is called."""
        entry_BSX = torch.cat((latent_BSC, k_rope_BSP), dim=-1)
        self._memory_BMX[layer][self._rows_B1, positions_BS] = entry_BSX.to(self._memory_BMX[layer].dtype)

    def read(self, layer: int, end: int) -> Tensor:
        """Return the entries [B, M=end, X] of slots 0..end-1; the latent is the first C columns."""
        return self._memory_BMX[layer][:, :end]

    def extend(self, num_tokens: int | Sequence[int]) -> None:
        """Count the last written tokens as part of each sequence: one number for all, or one each."""
        added = [num_tokens] * self.num_sequences if isinstance(num_tokens, int) else num_tokens
        self.truncate([length + more for length, more in zip(self.lengths, added, strict=True)])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Set each sequence's length; entries beyond it are forgotten.

        Raises ValueError for a length outside 0..max_length or another number of sequences.
        """
        if len(lengths) != self.num_sequences:
            raise ValueError(f"{len(lengths)} lengths for {self.num_sequences} sequences; give one each")
        if any(not 0 <= length <= self.max_length for length in lengths):
            raise ValueError(f"lengths {list(lengths)} must lie in [0, max_length={self.max_length}]")
        self.lengths = list(lengths)
