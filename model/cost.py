"""Parameters, FLOPs and bytes of a model, in closed form. The one place that computes them; imports no torch.

Architecture: arXiv 2412.19437, section 2. Every weight is counted once: an MTP module shares the embedding
and the output head of the main model, so they are not counted again as parameters, but its use of the head
costs FLOPs at every depth. FLOPs are those of matrix products: 2 per multiply-add, a backward pass is two
forward passes, and a causal token attends to half of its sequence on average. Norms, rotations, softmax and
the optimizer are left out, as is usual. DeepSeek-V3 at 4096 tokens: 671.03 B parameters, 36.62 B active ones
without the embedding, 250.4 GFLOP per token, 260.6 with its MTP module.
"""

from dataclasses import dataclass, fields

from model.config import Compute, ModelConfig

FP32_BYTES = 4

BACKWARD_AND_FORWARD = 3
"""Products per weight in a training step: the forward one and the two of the backward pass."""


def element_bytes(compute: Compute) -> int:
    """Return the bytes of one element of the compute type."""
    return 4 if compute is Compute.fp32 else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Number of weights by the part of the model that holds them."""

    embedding: int = 0
    attention: int = 0  # the projections of MLA, without its two norms
    dense_ffn: int = 0
    gate: int = 0  # router weights; the balancing bias is a buffer, not a parameter
    shared_experts: int = 0
    routed_experts: int = 0
    mtp_projection: int = 0  # eh_proj, equation 21
    norms: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Sum over all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def without_embedding(self) -> int:
        """Sum over all parts but the embedding, whose rows are looked up and not multiplied."""
        return self.total - self.embedding

    @property
    def matrices(self) -> int:
        """Weights that enter a matrix product."""
        return self.total - self.embedding - self.norms

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(**{p.name: getattr(self, p.name) + getattr(other, p.name) for p in fields(self)})

    def __mul__(self, count: int) -> "Parts":
        return Parts(**{p.name: getattr(self, p.name) * count for p in fields(self)})


def parameters(config: ModelConfig) -> Parts:
    """Return the weights of the main model, without its MTP modules."""
    return _main(config, experts=config.moe.num_experts)


def mtp_parameters(config: ModelConfig) -> Parts:
    """Return the weights that all MTP modules together add; the shared embedding and head are not counted."""
    return _mtp_module(config, experts=config.moe.num_experts) * config.num_mtp_layers


def active_parameters(config: ModelConfig) -> Parts:
    """Return the weights of the main model that one token meets: `top_k` of the routed experts, all else."""
    return _main(config, experts=config.moe.top_k)


def active_mtp_parameters(config: ModelConfig) -> Parts:
    """Return the weights that one token meets in all MTP modules, without the shared embedding and head."""
    return _mtp_module(config, experts=config.moe.top_k) * config.num_mtp_layers


def num_parameters(config: ModelConfig) -> int:
    """Return how many parameters a model of this configuration holds, MTP modules included."""
    return parameters(config).total + mtp_parameters(config).total


def layer_parameters(config: ModelConfig, layer: int) -> Parts:
    """Return the weights of one decoder layer, counted from 0."""
    dense = layer < config.num_dense_layers
    return _dense_block(config) if dense else _moe_block(config, experts=config.moe.num_experts)


def down_projections(config: ModelConfig) -> int:
    """Return the weights of MLA's projections to the latents and the rotary key, in one layer."""
    latents = (config.attention.q_lora_rank or 0) + config.attention.kv_lora_rank
    return config.hidden_size * (latents + config.attention.qk_rope_head_dim)


def layer_flops_per_token(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Return the training FLOPs per token of one decoder layer, counted from 0."""
    dense = layer < config.num_dense_layers
    block = _dense_block(config) if dense else _moe_block(config, experts=config.moe.top_k)
    return BACKWARD_AND_FORWARD * (2 * block.matrices + _attention_core_flops(config, seq_len))


def head_flops_per_token(config: ModelConfig) -> int:
    """Return the training FLOPs per token of the main model's use of the output head."""
    return BACKWARD_AND_FORWARD * 2 * config.vocab_size * config.hidden_size


def main_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the training FLOPs per token of the main model on sequences of `seq_len`."""
    matrices = 2 * active_parameters(config).matrices
    return BACKWARD_AND_FORWARD * (matrices + config.num_layers * _attention_core_flops(config, seq_len))


def mtp_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the training FLOPs per token of all MTP modules, the shared head counted once per depth."""
    head = config.vocab_size * config.hidden_size
    matrices = 2 * (active_mtp_parameters(config).matrices + config.num_mtp_layers * head)
    return BACKWARD_AND_FORWARD * (matrices + config.num_mtp_layers * _attention_core_flops(config, seq_len))


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs that training on one token takes: forward and backward, MTP modules included."""
    return main_flops_per_token(config, seq_len) + mtp_flops_per_token(config, seq_len)


def parameter_bytes(config: ModelConfig, *, compute: Compute) -> int:
    """Return the bytes of the weights as the forward pass reads them, router biases included.

    Norms, gate weights and gate biases are stored in FP32, everything else in the compute type.
    """
    parts = parameters(config) + mtp_parameters(config)
    wide = parts.norms + parts.gate
    biases = num_moe_layers(config) * config.moe.num_experts
    return FP32_BYTES * (wide + biases) + element_bytes(compute) * (parts.total - wide)


def gradient_bytes(config: ModelConfig) -> int:
    """Return the bytes of the gradients, which are accumulated in FP32."""
    return FP32_BYTES * num_parameters(config)


def optimizer_bytes(config: ModelConfig, *, compute: Compute, moment_bytes: int) -> int:
    """Return the bytes of AdamW's two moments and of the FP32 masters that are not the weights themselves."""
    parts = parameters(config) + mtp_parameters(config)
    needs_master = 0 if compute is Compute.fp32 else parts.total - parts.norms - parts.gate
    return FP32_BYTES * needs_master + 2 * moment_bytes * parts.total


def latent_cache_bytes_per_token(config: ModelConfig, *, compute: Compute) -> int:
    """Return the bytes that decoding keeps per token: one latent and one shared rotary key in every layer.

    arXiv 2405.04434, section 2.1.4. An MTP module that drafts keeps as much as one more layer.
    """
    per_layer = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
    return config.num_layers * per_layer * element_bytes(compute)


def block_input_bytes_per_token(config: ModelConfig, *, compute: Compute) -> int:
    """Return the bytes per token of all block inputs: what full recomputation keeps of the blocks."""
    return (config.num_layers + config.num_mtp_layers) * config.hidden_size * element_bytes(compute)


def num_moe_layers(config: ModelConfig) -> int:
    """Return how many blocks have a router, those of the MTP modules included."""
    return config.num_layers - config.num_dense_layers + config.num_mtp_layers


def _main(config: ModelConfig, *, experts: int) -> Parts:
    table = config.vocab_size * config.hidden_size
    num_moe = config.num_layers - config.num_dense_layers
    blocks = _dense_block(config) * config.num_dense_layers + _moe_block(config, experts=experts) * num_moe
    return blocks + Parts(embedding=table, head=table, norms=config.hidden_size)


def _mtp_module(config: ModelConfig, *, experts: int) -> Parts:
    """One depth: enorm, hnorm and the final norm, eh_proj, and a block that is always MoE."""
    hidden = config.hidden_size
    return _moe_block(config, experts=experts) + Parts(mtp_projection=2 * hidden * hidden, norms=3 * hidden)


def _dense_block(config: ModelConfig) -> Parts:
    return _attention(config) + Parts(dense_ffn=_swiglu(config, config.dense_intermediate_size))


def _moe_block(config: ModelConfig, *, experts: int) -> Parts:
    moe = config.moe
    one_expert = _swiglu(config, moe.intermediate_size)
    return _attention(config) + Parts(
        gate=moe.num_experts * config.hidden_size,
        shared_experts=moe.num_shared_experts * one_expert,
        routed_experts=experts * one_expert,
    )


def _swiglu(config: ModelConfig, intermediate_size: int) -> int:
    return 3 * config.hidden_size * intermediate_size


def _attention(config: ModelConfig) -> Parts:
    """MLA and the norms of a block: its two, and one on each compressed latent."""
    a, hidden = config.attention, config.hidden_size
    query_width = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    q_latent = a.q_lora_rank
    queries = hidden * query_width if q_latent is None else q_latent * (hidden + query_width)
    keys_values = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
    keys_values += a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    output = a.num_heads * a.v_head_dim * hidden
    return Parts(
        attention=queries + keys_values + output,
        norms=2 * hidden + (q_latent or 0) + a.kv_lora_rank,
    )


def _attention_core_flops(config: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs per token of q k^T and probabilities times v in one layer, over half of the sequence."""
    a = config.attention
    return a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim) * seq_len
