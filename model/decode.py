"""Reading a text once: prefill through the ordinary layers, then decode against cached latents.

Prefill is the model's ordinary forward, which leaves each token's latent in the cache. Decoding never
expands the cached latents to keys and values. Because keys and values are linear in the latent c_j,

    q_i^T (W_UK c_j) = (W_UK^T q_i)^T c_j     and     sum_j a_ij (W_UV c_j) = W_UV (sum_j a_ij c_j),

the query absorbs W_UK and the heads' output W_UV (arXiv 2405.04434, section 2.1.2 and appendix C): attention
becomes that of many query heads over ONE shared key [c ; rotated part] whose first columns are its value.
The results equal the ordinary path's up to the order of summation, within 1e-5 of the logits in FP32.

Prompts of different lengths are padded on the RIGHT: every sequence starts at position 0, no real token sees
a pad, and the pads' entries lie beyond the sequence's length, where the next tokens replace them.

Legend: B sequences, S new tokens, D hidden, H heads, N unrotated and P rotary width of queries, C key/value
latent, X = C + P, U value width, M memory slots, V vocabulary, F = P / 2.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from model.block import Block
from model.cache import LatentCache
from model.mla import MultiHeadLatentAttention
from model.moe import MoE
from model.mtp import MtpLayer
from model.transformer import Transformer


class _Place(NamedTuple):
    """Where the new tokens stand: their positions with rotations, cache slots, and the slots they may see."""

    cache: LatentCache
    positions_BS: Tensor
    table_BS2F: Tensor
    slots_BS: Tensor
    visible_BSM: Tensor | None  # None: the tokens are the first, and see one another in order

    @property
    def attend(self) -> "Attend":
        """The ordinary path for the first tokens, the absorbed one for all later ones."""
        return expanded_attention if self.visible_BSM is None else absorbed_attention


class IncrementalDecoder:
    """A model in evaluation mode together with the latent caches of its layers and of each MTP depth."""

    def __init__(self, model: Transformer, *, num_sequences: int = 1, max_length: int) -> None:
        self.model = model
        self.num_mtp_layers = len(model.mtp)
        weight = model.embed.weight

        def make(num_layers: int) -> LatentCache:
            return LatentCache(
                model.config.attention,
                num_layers=num_layers,
                num_sequences=num_sequences,
                max_length=max_length,
                dtype=weight.dtype,
                device=weight.device,
            )

        self.cache = make(len(model.layers))
        self.mtp_caches = [make(1) for _ in range(self.num_mtp_layers)]

    @torch.no_grad()
    def run(self, tokens_BS: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Read the next tokens of every sequence; return their final hidden states [B, S, D].

        An empty cache is prefilled through the ordinary path, otherwise the absorbed one is taken.

        Args:
            tokens_BS: int64, padded on the right where sequences differ in length.
            lengths: real tokens of each row; None when no row is padded.
        """
        hidden_BSD = self._run_main(tokens_BS, self._next_place(self.cache, tokens_BS.shape[1]))
        self.cache.extend(tokens_BS.shape[1] if lengths is None else lengths)
        return hidden_BSD

    @torch.no_grad()
    def run_branches(self, tokens_NS: Tensor) -> Tensor:
        """Read N alternative continuations of the one cached text at once; return hidden states [N, S, D].

        Each sees the text and itself. They share the text's entries, so N costs no copies; their own
        lie one after the other behind it, and are forgotten: the cache's length stays.
        """
        num_branches, num_tokens = tokens_NS.shape
        start = self.cache.lengths[0]
        slots_1T = self.cache.next_positions(tokens_NS.numel())  # T = N * S
        device = slots_1T.device
        branch_T, offset_T = (slots_1T[0] - start) // num_tokens, (slots_1T[0] - start) % num_tokens
        own_TT = (branch_T[:, None] == branch_T) & (offset_T <= offset_T[:, None])
        shared_TM = torch.ones(len(own_TT), start, dtype=torch.bool, device=device)
        positions_1T = (start + offset_T)[None]
        place = _Place(
            cache=self.cache,
            positions_BS=positions_1T,
            table_BS2F=self.model.rope(positions_1T),
            slots_BS=slots_1T,
            visible_BSM=torch.cat((shared_TM, own_TT), dim=1)[None],
        )
        return self._run_main(tokens_NS.reshape(1, -1), place).unflatten(1, (num_branches, num_tokens))[0]

    @torch.no_grad()
    def run_mtp(self, depth: int, hidden_BSD: Tensor, tokens_BS: Tensor, *, start: int) -> Tensor:
        """Run MTP depth 1..D over positions start..start+S-1; return its hidden states [B, S, D].

        What its cache held from `start` on is replaced (arXiv 2412.19437, equations 21 to 23).

        Args:
            depth: k, counted from 1.
            hidden_BSD: depth k-1's final hidden states at these positions; the main model's for k = 1.
            tokens_BS: t_{i+k} for each position i.
            start: the first position, the same for every sequence.
        """
        cache = self.mtp_caches[depth - 1]
        cache.truncate([start] * cache.num_sequences)
        place = self._next_place(cache, tokens_BS.shape[1])
        layer = cast(MtpLayer, list(self.model.mtp.values())[depth - 1])
        embedding_BSD = self.model.embed(tokens_BS.to(hidden_BSD.device))
        joined_BSX = torch.cat((layer.enorm(embedding_BSD), layer.hnorm(hidden_BSD)), dim=-1)
        x_BSD = _run_block(layer.block, layer.eh_proj(joined_BSX), place, 0)
        cache.extend(tokens_BS.shape[1])
        return layer.norm(x_BSD)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return FP32 logits [..., V] of final hidden states [..., D], main model's or MTP's alike."""
        return self.model.head(hidden).float()

    def _next_place(self, cache: LatentCache, num_tokens: int) -> _Place:
        positions_BS = cache.next_positions(num_tokens)
        table_BS2F = self.model.rope(positions_BS)
        visible_BSM = None
        if max(cache.lengths) > 0:
            slots_M = torch.arange(max(cache.lengths) + num_tokens, device=positions_BS.device)
            visible_BSM = slots_M <= positions_BS[..., None]  # neither later tokens nor stale entries
        return _Place(cache, positions_BS, table_BS2F, positions_BS, visible_BSM)

    def _run_main(self, tokens_BS: Tensor, place: _Place) -> Tensor:
        x_BSD = self.model.embed(tokens_BS.to(place.slots_BS.device))
        for layer, block in enumerate(self.model.layers.values()):
            x_BSD = _run_block(cast(Block, block), x_BSD, place, layer)
        return self.model.norm(x_BSD)


Attend = Callable[[MultiHeadLatentAttention, Tensor, _Place, int], Tensor]


def expanded_attention(
    attention: MultiHeadLatentAttention, x_BSD: Tensor, place: _Place, layer: int
) -> Tensor:
    """Return the ordinary attention among the new tokens [B, S, D], and cache their latents.

    Right only for an empty cache: entries written earlier are not looked at.
    """
    q_BSHK = attention.expand_queries(attention.compress_queries(x_BSD), place.table_BS2F)
    memory = attention.compress_memory(x_BSD, place.table_BS2F, place.positions_BS)
    place.cache.write(layer, memory.latent_BMC, memory.k_rope_BMP, place.slots_BS)
    k_BSHK, v_BSHU = attention.expand_memory(memory.latent_BMC, memory.k_rope_BMP)
    o_BSHU = attention.core.attend(
        q_BSHK,
        k_BSHK,
        v_BSHU,
        q_positions_BS=place.positions_BS,
        k_positions_BM=memory.positions_BM,
        scale=attention.scale,
    )
    return attention.output(o_BSHU)


def absorbed_attention(
    attention: MultiHeadLatentAttention, x_BSD: Tensor, place: _Place, layer: int
) -> Tensor:
    """Return the attention of the new tokens over the cached ones they may see [B, S, D], in latent space."""
    assert place.visible_BSM is not None  # `_Place.attend` chooses this function by it
    memory = attention.compress_memory(x_BSD, place.table_BS2F, place.positions_BS)
    place.cache.write(layer, memory.latent_BMC, memory.k_rope_BMP, place.slots_BS)
    memory_BMX = place.cache.read(layer, place.visible_BSM.shape[-1])

    up_HEC = attention.wkv_b.weight.unflatten(0, (-1, attention.nope + attention.value))
    w_uk_HNC, w_uv_HUC = up_HEC.split((attention.nope, attention.value), dim=1)
    q_BSHK = attention.expand_queries(attention.compress_queries(x_BSD), place.table_BS2F)
    q_nope_BSHN, q_rope_BSHP = q_BSHK.split((attention.nope, attention.rope), dim=-1)
    q_latent_BSHC = torch.einsum("bshn,hnc->bshc", q_nope_BSHN, w_uk_HNC)
    q_BSHX = torch.cat((q_latent_BSHC, q_rope_BSHP), dim=-1)

    scores_BHSM = torch.einsum("bshx,bmx->bhsm", q_BSHX, memory_BMX).float() * attention.scale
    weights_BHSM = scores_BHSM.masked_fill(~place.visible_BSM[:, None], float("-inf")).softmax(-1)
    latent_BMC = memory_BMX[..., : w_uk_HNC.shape[-1]]
    o_latent_BSHC = torch.einsum("bhsm,bmc->bshc", weights_BHSM.to(latent_BMC.dtype), latent_BMC)
    return attention.output(torch.einsum("bshc,huc->bshu", o_latent_BSHC, w_uv_HUC))


def _run_block(block: Block, x_BSD: Tensor, place: _Place, layer: int) -> Tensor:
    x_BSD = x_BSD + place.attend(block.attn, block.attn_norm(x_BSD), place, layer)
    if not isinstance(block.ffn, MoE):
        return block.feed_forward(x_BSD)
    routed = block.route(x_BSD)
    dispatched = block.dispatch(routed)
    output = block.experts(routed, dispatched)
    return block.combine(x_BSD, output, routed, dispatched, balance_scale=0.0)
