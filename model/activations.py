"""Bytes of activations that wait for the backward pass, in closed form. Imports no torch.

What one block keeps of a token, by recomputation mode (arXiv 2412.19437, section 3.2.3). `x` is an element of
the compute type; `8` is FP8: a byte, and four bytes of scale for every 128 elements of a row (section 3.3.3).
A second symbol is the one under an FP8 `gemm`, where it differs; `-` is recomputed.

    tensor                              width                   none      deepseek   core    full
    input of the block                  hidden                  x         x          x       x
    its norm                            hidden                  x, 8      -          -       -
    latents before their norms          q_lora + kv_lora + rope x         x          x       -
    latents after them                  q_lora + kv_lora        x, 8      -          -       -
    rotary part of the keys             rope                    -         x          x       -
    queries, keys, values               heads * (2 K + U)       x         -          -       -
    attention output                    heads * U               x, 8      x, 8       -       -
    input of the feed-forward           hidden                  x         x          x       -
    its norm, for dense or shared       hidden                  x, 8      -          -       -
    its norm, for the gate              hidden                  x         -          -       -
    rows of routed experts              top_k * hidden          x, 8      -          -       -
    gate and up                         2 * intermediate        x, 8      x, 8       x, 8    -
    SwiGLU output, dense or shared      intermediate            x, -      -          -       -

with K the width of a query's head, U that of a value's; intermediate is that of the dense network, or of the
shared experts and of top_k routed ones. Each norm keeps 4 bytes a token; the router some FP32 numbers for
each expert, and row numbers (these under `full` as well). The SwiGLU output of routed experts is never kept.

Outside the blocks, which recomputation does not change but for the concatenation:

    embedding          token numbers
    MTP module         embedding and hidden states that it joins, their norms side by side, input of its norm
    last norm          its input
    loss               the gradient of the hidden states, and that of the head's weight in FP32, whole: both
                       are computed in the forward pass (model/kernels/cross_entropy.py)

Where work is spread over devices, `Spread` says how. What one device gathers from others is kept, as no
exchange is repeated: the latents, the input of dense and shared networks, the rows of routed experts.

The figures are those of the CPU's kernels, which in the compute type fill the rows of each expert up to a
multiple of 64 (the mean of that is counted by microbatch). What is left of a microbatch while its weight
gradients are put off is in model/put_off.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from model.config import Compute, Gemm, ModelConfig, Recompute
from model.cost import FP32_BYTES, element_bytes

INT64_BYTES = 8
FP8_TILE = 128
EXPERT_ROWS = 64
"""In the compute type gate and up of each expert have a multiple of this many rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How the work on a token is spread over devices; the default is one device.

    Every count below is for each token of the microbatch on which this device runs attention, which are those
    of all devices that share its heads: `sequence_shares` times as many as it holds between layers.
    """

    sequence_shares: int = 1
    """Devices that split heads, channels and vocabulary among them, and tokens between layers."""
    memory_tokens: float = 1.0
    """Tokens whose keys and values are looked at, for each token of queries: more than one where the sequence
    is spread further, and memory is gathered."""
    routed_rows: float | None = None
    """Rows of the routed experts held here; None: those of the own tokens, top_k / sequence_shares."""
    experts: int | None = None
    """Routed experts held here in each layer; None: all of them. 0 for kernels that fill no rows up."""
    arrived_rows: float | None = None
    """Rows that other devices sent for them; None: experts are not spread. Equal to routed_rows where a row
    is sent for each expert, less where a token is sent once and copied here."""
    coded_rows: bool = False
    """Whether these rows arrive, and are kept, as FP8 codes with one byte of scale for each tile."""


ONE_DEVICE = Spread()


def saved_bytes_per_token(
    config: ModelConfig,
    *,
    layer: int,
    recompute: Recompute,
    compute: Compute,
    gemm: Gemm,
    spread: Spread = ONE_DEVICE,
) -> float:
    """Return the bytes of activations that one decoder layer, counted from 0, keeps of a token."""
    keeper = _Keeper(config, recompute, element_bytes(compute), gemm is not Gemm.compute, spread)
    return keeper.block(dense=layer < config.num_dense_layers)


def mtp_saved_bytes_per_token(
    config: ModelConfig,
    *,
    recompute: Recompute,
    compute: Compute,
    gemm: Gemm,
    spread: Spread = ONE_DEVICE,
) -> float:
    """Return the bytes of activations that one MTP module keeps of a token, without its loss."""
    keeper = _Keeper(config, recompute, element_bytes(compute), gemm is not Gemm.compute, spread)
    return keeper.mtp_module()


def embedding_saved_bytes_per_token(config: ModelConfig, *, depths: int) -> int:
    """Return the bytes that the lookup for `depths` rows a token keeps: token numbers."""
    return INT64_BYTES * depths


def head_saved_bytes_per_token(
    config: ModelConfig, *, compute: Compute, depths: int, spread: Spread = ONE_DEVICE
) -> float:
    """Return the bytes of a token that the last norm and the loss over `depths` targets a token keep."""
    last_norm = (config.hidden_size * element_bytes(compute) + FP32_BYTES) / spread.sequence_shares
    return last_norm + depths * (config.hidden_size * element_bytes(compute) + FP32_BYTES)


def head_gradient_bytes(config: ModelConfig, *, spread: Spread = ONE_DEVICE) -> int:
    """Return the bytes of the gradient of the head's weight, which waits with the loss's activations."""
    return FP32_BYTES * config.vocab_size * config.hidden_size // spread.sequence_shares


def microbatch_saved_bytes(
    config: ModelConfig,
    *,
    layers: Iterable[int],
    first: bool,
    last: bool,
    tokens: int,
    recompute: Recompute,
    compute: Compute,
    gemm: Gemm,
    spread: Spread = ONE_DEVICE,
) -> int:
    """Return the bytes that one microbatch leaves in a part of the model between forward and backward pass.

    Args:
        config: the model.
        layers: the decoder layers of the part, counted from 0.
        first: whether the part embeds tokens.
        last: whether it has the last norm, the MTP modules and the loss.
        tokens: of the microbatch, as `Spread` counts them, MTP's own not added.
        recompute: the mode.
        compute: the type of activations.
        gemm: what multiplies inside the blocks.
        spread: how work is spread over devices.
    """
    keeper = _Keeper(config, recompute, element_bytes(compute), gemm is not Gemm.compute, spread)
    dense = [layer < config.num_dense_layers for layer in layers]
    num_mtp = config.num_mtp_layers if last else 0
    of_token: float = FP32_BYTES * config.attention.qk_rope_head_dim  # cos and sin, for all layers at once
    of_token += sum(keeper.block(dense=is_dense) for is_dense in dense) + num_mtp * keeper.mtp_module()
    of_token += embedding_saved_bytes_per_token(config, depths=(1 if first else 0) + num_mtp)
    whole = (dense.count(False) + num_mtp) * keeper.filling()
    if last:
        of_token += head_saved_bytes_per_token(config, compute=compute, depths=1 + num_mtp, spread=spread)
        whole += head_gradient_bytes(config, spread=spread)
    return round(tokens * of_token + whole)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """The bytes that the parts of a block keep of a token; element: bytes of the compute type."""

    config: ModelConfig
    recompute: Recompute
    element: int
    fp8: bool
    spread: Spread

    def block(self, *, dense: bool) -> float:
        """Return the bytes of a whole block."""
        shares = self.spread.sequence_shares
        own_token = self._numbers(self.config.hidden_size)
        if self.recompute is Recompute.full:
            return own_token / shares + (0 if dense else self._row_numbers())
        norms_and_inputs = 2 * (own_token + FP32_BYTES)
        feed_forward = self._network(self.config.dense_intermediate_size) if dense else self._moe()
        return norms_and_inputs / shares + self._attention() + feed_forward + self._dropout()

    def mtp_module(self) -> float:
        """Return the bytes of an MTP module: what its block keeps, and what it joins."""
        hidden = self._numbers(self.config.hidden_size)
        inputs_of_norms = 3 * (hidden + FP32_BYTES)
        joined = 2 * hidden if self.recompute in (Recompute.none, Recompute.full) else 0
        return (inputs_of_norms + joined) / self.spread.sequence_shares + self.block(dense=False)

    def filling(self) -> float:
        """Return the bytes, of one layer and whatever its tokens, of rows that fill up those of experts."""
        if self.fp8 or self.recompute is Recompute.full:
            return 0
        moe, experts = self.config.moe, self.spread.experts
        rows = (EXPERT_ROWS - 1) / 2 * (moe.num_experts if experts is None else experts)
        return rows * (self._numbers(2 * moe.intermediate_size) + FP32_BYTES)

    def _numbers(self, width: float) -> float:
        return self.element * width

    def _operand(self, width: int) -> float:
        """Return the bytes of what a product keeps of its input."""
        return width + FP32_BYTES * -(-width // FP8_TILE) if self.fp8 else self._numbers(width)

    @property
    def _keeps_all(self) -> bool:
        return self.recompute is Recompute.none

    def _attention(self) -> float:
        """Latents, queries, keys, values and output, without the norm before."""
        sizes, shares, memory = self.config.attention, self.spread.sequence_shares, self.spread.memory_tokens
        q_latent, kv_latent, rope = sizes.q_lora_rank, sizes.kv_lora_rank, sizes.qk_rope_head_dim
        norms = 1 if q_latent is None else 2
        kept = self._numbers((q_latent or 0) + kv_latent + rope) / shares + norms * FP32_BYTES / shares
        if self._keeps_all:
            kept += self._operand(self.config.hidden_size) / shares
        kept += self._queries() + memory * self._memory()
        if self._keeps_all:
            q_width = sizes.qk_nope_head_dim + rope
            kept += (
                self._numbers(sizes.num_heads * (q_width + memory * (q_width + sizes.v_head_dim))) / shares
            )
        if self.recompute is not Recompute.core:
            kept += self._operand(sizes.num_heads * sizes.v_head_dim // shares)
        return kept

    def _queries(self) -> float:
        """What the up projection of queries takes: gathered tokens are kept, those of a norm recomputed."""
        width, gathered = self.config.attention.q_lora_rank, self.spread.sequence_shares > 1
        if width is None:
            width = self.config.hidden_size
            if not gathered:
                return 0  # the input of all projections, counted there
        if self._keeps_all:
            return self._operand(width)
        return (self._numbers(width) + (self._operand(width) if self.fp8 else 0)) if gathered else 0

    def _memory(self) -> float:
        """The same for keys and values, per token of the memory."""
        latent, rope = self.config.attention.kv_lora_rank, self.config.attention.qk_rope_head_dim
        gathered = self.spread.sequence_shares > 1 or self.spread.memory_tokens > 1
        if self._keeps_all:
            return self._operand(latent) if self.fp8 or not gathered else self._numbers(latent + rope)
        kept = self._numbers(latent + rope if gathered else rope)
        return kept + (self._operand(latent) if gathered and self.fp8 else 0)

    def _network(self, intermediate: int) -> float:
        """A SwiGLU network that every token passes, and its input."""
        hidden, shares = self.config.hidden_size, self.spread.sequence_shares
        kept: float = self._operand(hidden) if self._keeps_all or shares > 1 else 0
        kept += 2 * self._operand(intermediate // shares)
        if self._keeps_all and not self.fp8:
            kept += self._numbers(intermediate // shares)
        return kept

    def _moe(self) -> float:
        """Gate, shared and routed experts."""
        moe, hidden, shares = self.config.moe, self.config.hidden_size, self.spread.sequence_shares
        kept = self._router() / shares + self._row_numbers()
        has_network = moe.num_shared_experts > 0
        if has_network:
            kept += self._network(moe.num_shared_experts * moe.intermediate_size)
        # in the compute type gate and network keep the same tensor, unless the network's tokens are gathered
        if self._keeps_all and (self.fp8 or not has_network or shares > 1):
            kept += self._numbers(hidden) / shares
        kept += self._routed_rows * (2 * self._operand(moe.intermediate_size) + FP32_BYTES)
        return kept + self._rows()

    @property
    def _routed_rows(self) -> float:
        rows = self.spread.routed_rows
        return self.config.moe.top_k / self.spread.sequence_shares if rows is None else rows

    def _rows(self) -> float:
        """The inputs of the routed experts."""
        hidden, arrived = self.config.hidden_size, self.spread.arrived_rows
        if self._keeps_all:
            return self._routed_rows * self._operand(hidden)
        if arrived is None:
            return 0  # copies of a norm's output
        if self.spread.coded_rows:
            return arrived * (hidden + -(-hidden // FP8_TILE))
        return arrived * self._numbers(hidden)

    def _router(self) -> int:
        """Affinities, weights before and after they are normalised, choices."""
        moe = self.config.moe
        kept = FP32_BYTES * moe.num_experts + (FP32_BYTES + INT64_BYTES) * moe.top_k
        return kept + FP32_BYTES * (2 if moe.normalize_weights else 1)

    def _row_numbers(self) -> float:
        """Orders of routed rows: by expert, by token, the inverse; of those that arrived, and its inverse."""
        own = 3 * INT64_BYTES * self.config.moe.top_k / self.spread.sequence_shares
        return own + (0 if self.spread.arrived_rows is None else 2 * INT64_BYTES * self._routed_rows)

    def _dropout(self) -> float:
        masks = 2 if self.config.dropout else 0
        return masks * self._numbers(self.config.hidden_size) / self.spread.sequence_shares
