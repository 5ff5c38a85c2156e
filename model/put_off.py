"""Bytes that wait for weight gradients which a schedule puts off, in closed form. Imports no torch.

Once the gradients of inputs are there, a microbatch has left of each matrix product only the two factors of
its weight's gradient (model/weight_gradients.py): the input, brought back where it is recomputed, and the
gradient of the output. What one block then holds of a token, whatever is recomputed; `x` is an element of the
compute type, under an FP8 `gemm` the factors are codes: `r` a byte, and four bytes of scale for every 128
elements of a row; `c` a byte, and four bytes of scale for every 128 rows of a column.

    product                    input                width              gradient   width
    wq_a, wkv_a                norm, for both       hidden     x, r    x, c       q_lora + kv_lora + rope
    wq_b (or wq)               latent (norm)        q_lora     x, r    x, c       heads * K
    wkv_b                      latent               kv_lora    x, r    x, c       heads * (N + U)
    wo                         attention output     heads * U  x, r    x, c       hidden
    w1, w3 of a network        norm, for both       hidden     x, r    x, c       2 * intermediate
    w2 of a network            SwiGLU output        interm.    x, c    x, c       hidden
    w1, w3 of routed experts   rows                 hidden     x, r    x, c       2 * intermediate
    w2 of routed experts       SwiGLU output        interm.    x, c    x, c       hidden
    eh_proj of an MTP module   what it joins        2 * hidden x       x          hidden

with N the unrotated part of K; a network is the dense one or the shared experts. Routed experts count by row,
of which there are top_k a token. In the compute type their hidden sizes are filled up to a multiple of 64
rows an expert, as codes everything is to one of 128; the mean of either is counted by microbatch.

Nothing waits of embedding, norms, gate and head, whose gradients are added at once, nor of the attention core
and of routing. Where work is spread over devices, gathered tokens wait as a whole, on either side of a
product whose weight is split.

These are more bytes than the forward pass leaves: inputs are back that were recomputed, and gradients are
new. A block of DeepSeek-V3 with all its experts leaves 0.58 GB of 4096 tokens under recompute=deepseek and
then waits with 2.27 GB; as codes it is 0.37 and 1.17 GB.

Not counted: on a CPU and in the compute type, copies of the last expert's rows and output gradients, which
are made where their number is no multiple of 64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from model.activations import EXPERT_ROWS, FP8_TILE, ONE_DEVICE, Spread
from model.config import Compute, Gemm, ModelConfig
from model.cost import FP32_BYTES, element_bytes


def microbatch_put_off_bytes(
    config: ModelConfig,
    *,
    layers: Iterable[int],
    last: bool,
    tokens: int,
    compute: Compute,
    gemm: Gemm,
    spread: Spread = ONE_DEVICE,
) -> int:
    """Return the bytes of one microbatch that wait for the weight gradients of a part of the model.

    Arguments as of `model.activations.microbatch_saved_bytes`; it does not matter what is recomputed.
    """
    factors = _Factors(config, element_bytes(compute), gemm is not Gemm.compute, spread)
    dense = [layer < config.num_dense_layers for layer in layers]
    num_mtp = config.num_mtp_layers if last else 0
    of_token = sum(factors.block(dense=is_dense) for is_dense in dense) + num_mtp * factors.mtp_module()
    return round(tokens * of_token + (dense.count(False) + num_mtp) * factors.filling())


@dataclass(frozen=True, slots=True)
class _Factors:
    """The bytes of the factors of a token; element: bytes of the compute type."""

    config: ModelConfig
    element: int
    fp8: bool
    spread: Spread

    def block(self, *, dense: bool) -> float:
        """Return the bytes of a block's products."""
        if dense:
            return self._attention() + self._network(self.config.dense_intermediate_size)
        moe, spread = self.config.moe, self.spread
        rows = moe.top_k / spread.sequence_shares if spread.routed_rows is None else spread.routed_rows
        width = moe.num_shared_experts * moe.intermediate_size
        return self._attention() + (self._network(width) if width else 0) + rows * self._row()

    def mtp_module(self) -> float:
        """Return the bytes of an MTP module, whose projection is in the compute type."""
        joint = self.element * 3 * self.config.hidden_size
        return joint / self.spread.sequence_shares + self.block(dense=False)

    def filling(self) -> float:
        """Return the bytes, of one layer and whatever its tokens, of rows that fill up those of experts."""
        moe, experts = self.config.moe, self.spread.experts
        count = moe.num_experts if experts is None else experts
        if self.fp8:
            return count * (FP8_TILE - 1) / 2 * self._row()
        return count * (EXPERT_ROWS - 1) / 2 * self.element * 3 * moe.intermediate_size

    def _input(self, width: int) -> float:
        """Return the bytes of an input, coded along its rows."""
        return width + FP32_BYTES * -(-width // FP8_TILE) if self.fp8 else self.element * width

    def _gradient(self, width: float) -> float:
        """Return the bytes of an output's gradient, coded along its columns."""
        return width * (1 + FP32_BYTES / FP8_TILE) if self.fp8 else self.element * width

    def _attention(self) -> float:
        sizes, hidden, shares = self.config.attention, self.config.hidden_size, self.spread.sequence_shares
        kv_latent, rope, memory = sizes.kv_lora_rank, sizes.qk_rope_head_dim, self.spread.memory_tokens
        queries = sizes.num_heads * (sizes.qk_nope_head_dim + rope) // shares
        expanded = sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim) // shares
        own = self._input(hidden) + self._gradient((sizes.q_lora_rank or 0) + kv_latent + rope)
        gathered = self._gradient(queries) + self._queries()
        # latent and rotary part come side by side where devices that share heads gather nothing else
        beside = rope if shares > 1 and memory == 1 and not self.fp8 else 0
        gathered += memory * (self._input(kv_latent + beside) + self._gradient(expanded))
        output = self._input(sizes.num_heads * sizes.v_head_dim // shares) + self._gradient(hidden)
        return own / shares + gathered + output

    def _queries(self) -> float:
        """Return the bytes of what queries are projected from."""
        if self.config.attention.q_lora_rank is not None:
            return self._input(self.config.attention.q_lora_rank)
        return self._input(self.config.hidden_size) if self.spread.sequence_shares > 1 else 0

    def _network(self, intermediate: int) -> float:
        """Return the bytes of a SwiGLU network that every token passes."""
        hidden, width = self.config.hidden_size, intermediate // self.spread.sequence_shares
        return self._input(hidden) + self._gradient(3 * width + hidden)

    def _row(self) -> float:
        """Return the bytes of a row of the routed experts."""
        hidden = self.config.hidden_size
        return self._input(hidden) + self._gradient(3 * self.config.moe.intermediate_size + hidden)
