"""Multi-head latent attention (arXiv 2405.04434, section 2.1; arXiv 2412.19437, equations 1 to 11).

Queries and keys/values are projected down to small latents, normalised, and projected up to all heads. Keys
carry position in a separate rotary part, one vector shared by all heads and taken from the hidden state. The
phases are methods: compress (what a token leaves behind), gather (by the core), expand, attend, output.
Where the tokens between layers are spread over devices that share the heads (`split`), only the latents are
gathered: compress sees this device's own tokens, expand and attend all tokens and this device's heads.

Legend: B sequences, S length (s of it on this device, between layers), D hidden, H heads, N unrotated and P
rotary width of queries and keys, K = N + P, U value width, Q query latent, C key/value latent, M tokens of
the memory, F = P / 2.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model.attention import AttentionCore, LocalAttention, Memory
from model.config import AttentionConfig, ModelConfig, Recompute, YarnConfig
from model.linear import Linear
from model.norm import RMSNorm
from model.recompute import core_region, region
from model.rope import apply_rope, softmax_scale
from model.split import SequenceSplit, WholeSequences

# The released code normalises the latents with its default epsilon, whatever the configured one.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Attention through compressed latents; `core` is the seam for split sequences and other kernels."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, yarn: YarnConfig | None, recompute: Recompute
    ) -> None:
        super().__init__()
        sizes: AttentionConfig = config.attention
        self.config = sizes
        self.recompute = recompute
        self.core: AttentionCore = LocalAttention()
        self.split: SequenceSplit = WholeSequences()
        self.nope, self.rope, self.value = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim
        q_width = sizes.num_heads * (self.nope + self.rope)
        kv_width = sizes.num_heads * (self.nope + self.value)
        if sizes.q_lora_rank is None:
            self.wq = Linear(config.hidden_size, q_width, dtype=dtype)
        else:
            self.wq_a = Linear(config.hidden_size, sizes.q_lora_rank, dtype=dtype)
            self.q_norm = RMSNorm(sizes.q_lora_rank, eps=LATENT_NORM_EPS)
            self.wq_b = Linear(sizes.q_lora_rank, q_width, dtype=dtype)
        self.wkv_a = Linear(config.hidden_size, sizes.kv_lora_rank + self.rope, dtype=dtype)
        self.kv_norm = RMSNorm(sizes.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.wkv_b = Linear(sizes.kv_lora_rank, kv_width, dtype=dtype)
        self.wo = Linear(sizes.num_heads * self.value, config.hidden_size, dtype=dtype)
        self.set_yarn(yarn)

    def set_yarn(self, yarn: YarnConfig | None) -> None:
        """Set the softmax scale that belongs to a rotation setting."""
        self.scale = softmax_scale(self.config, yarn)

    def forward(self, x_BsD: Tensor, table_BS2F: Tensor, positions_BS: Tensor) -> Tensor:
        """Return the attention output [B, s, D] of the normalised hidden states x."""
        latent_BSQ = self.split.gather(self.compress_queries(x_BsD))
        q_BSHK = region(self.recompute, self.expand_queries, latent_BSQ, table_BS2F)
        own_table, own_positions = self.split.own(table_BS2F), self.split.own(positions_BS)
        memory = self.core.gather(self.compress_memory(x_BsD, own_table, own_positions))
        k_BMHK, v_BMHU = region(self.recompute, self.expand_memory, memory.latent_BMC, memory.k_rope_BMP)
        attend = partial(
            self.core.attend,
            q_positions_BS=positions_BS,
            k_positions_BM=memory.positions_BM,
            scale=self.scale,
        )
        o_BSHU = core_region(self.recompute, attend, q_BSHK, k_BMHK, v_BMHU)
        return self.output(o_BSHU)

    def compress_queries(self, x_BSD: Tensor) -> Tensor:
        """Return the normalised query latent [B, S, Q]; x itself where queries are projected directly."""
        if self.config.q_lora_rank is None:
            return x_BSD
        return region(self.recompute, self.q_norm, self.wq_a(x_BSD))

    def expand_queries(self, latent_BSQ: Tensor, table_BS2F: Tensor) -> Tensor:
        """Return the queries of all heads [B, S, H, K], the last P channels rotated."""
        project = self.wq if self.config.q_lora_rank is None else self.wq_b
        q_BSHK = project(latent_BSQ).unflatten(-1, (-1, self.nope + self.rope))
        nope_BSHN, rope_BSHP = q_BSHK.split((self.nope, self.rope), dim=-1)
        return _head_major(nope_BSHN, apply_rope(rope_BSHP, table_BS2F))

    def compress_memory(self, x_BSD: Tensor, table_BS2F: Tensor, positions_BS: Tensor) -> Memory:
        """Return what each token leaves behind: its normalised latent and the rotated shared key part."""
        raw_BSC, k_rope_BSP = self.wkv_a(x_BSD).split((self.config.kv_lora_rank, self.rope), dim=-1)
        latent_BSC = region(self.recompute, self.kv_norm, raw_BSC)
        k_rope_BSP = apply_rope(k_rope_BSP[:, :, None], table_BS2F)[:, :, 0]
        return Memory(latent_BSC, k_rope_BSP, positions_BS)

    def expand_memory(self, latent_BMC: Tensor, k_rope_BMP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys [B, M, H, K] and values [B, M, H, U] of all heads."""
        kv_BMHX = self.wkv_b(latent_BMC).unflatten(-1, (-1, self.nope + self.value))
        nope_BMHN, v_BMHU = kv_BMHX.split((self.nope, self.value), dim=-1)
        k_rope_BMHP = k_rope_BMP[:, :, None].expand(-1, -1, nope_BMHN.shape[2], -1)
        return _head_major(nope_BMHN, k_rope_BMHP), _head_major(v_BMHU)

    def output(self, o_BSHU: Tensor) -> Tensor:
        """Return the output projection [B, s, D] of the heads' results."""
        return self.split.scatter(self.wo(o_BSHU.flatten(2)))


def _head_major(*parts_BSHX: Tensor) -> Tensor:
    """Return the parts side by side as a [B, S, H, X] view of [B, H, S, X] memory.

    The copy is needed anyway; in this order the attention's batched products read it as it lies.
    """
    return torch.cat([part_BSHX.transpose(1, 2) for part_BSHX in parts_BSHX], dim=-1).transpose(1, 2)
