"""The names and shapes of DeepSeek's open weights, and where each of them lives in our parameter tree.

The open weights keep one tensor per expert, we keep all experts of a layer stacked; they call w1, w3 and w2
gate_proj, up_proj and down_proj; and they append MTP module k as layer `num_layers + k`, with its own copy of
the embedding and of the output head, which we share with the main model (arXiv 2412.19437, section 2.2).
The rotary part uses interleaved pairs on both sides, so no weight is permuted. Importable without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from model.config import ModelConfig


class Role(StrEnum):
    """What a tensor of the open weights is to us."""

    WEIGHT = "weight"
    """A parameter of ours."""
    LINEAR = "linear"
    """The matrix of a linear map inside a block, or one expert's slice of it: what a file may hold in FP8
    (arXiv 2412.19437, section 3.3). Embedding, head, gate and MTP's `eh_proj` are WEIGHT: never FP8."""
    ROUTER_BIAS = "router_bias"
    """A balancing bias: FP32 in every file, whatever the type of the weights."""
    COPY = "copy"
    """A second copy of a weight that we hold once: written always, optional in a file that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTensor:
    """One tensor of the open weights."""

    name: str
    shape: tuple[int, ...]
    source: str  # our name
    expert: int | None = None  # which slice of our stacked tensor; None: all of it
    role: Role = Role.WEIGHT

    @property
    def is_copy(self) -> bool:
        """Whether a file may leave this tensor out."""
        return self.role is Role.COPY


def hf_tensors(config: ModelConfig) -> list[HfTensor]:
    """Return every tensor of the open weights of this model, in the order of a file: layer by layer."""
    table = (config.vocab_size, config.hidden_size)
    found = [HfTensor(name="model.embed_tokens.weight", shape=table, source="embed.weight")]
    for i in range(config.num_layers):
        dense = i < config.num_dense_layers
        found += _block(config, hf=f"model.layers.{i}", ours=f"layers.{i}", dense=dense)
    found.append(HfTensor(name="model.norm.weight", shape=(config.hidden_size,), source="norm.weight"))
    found.append(HfTensor(name="lm_head.weight", shape=table, source="head.weight"))
    for k in range(config.num_mtp_layers):
        found += _mtp_module(config, depth=k)
    return found


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of our state dict by name, router biases included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in hf_tensors(config):
        stacked = () if tensor.expert is None else (config.moe.num_experts,)
        shapes[tensor.source] = stacked + tensor.shape
    return shapes


def is_mtp_tensor(name: str, config: ModelConfig) -> bool:
    """Return whether a name of the open weights belongs to a layer behind the last one of the main model."""
    parts = name.split(".")
    return name.startswith("model.layers.") and parts[2].isdigit() and int(parts[2]) >= config.num_layers


def _mtp_module(config: ModelConfig, *, depth: int) -> Iterator[HfTensor]:
    """Equation 21 to 23: two norms and a projection in front of the block, a norm before the shared head."""
    hf, ours, hidden = f"model.layers.{config.num_layers + depth}", f"mtp.{depth}", config.hidden_size
    table = (config.vocab_size, hidden)
    copy = Role.COPY
    yield HfTensor(name=f"{hf}.embed_tokens.weight", shape=table, source="embed.weight", role=copy)
    yield HfTensor(name=f"{hf}.enorm.weight", shape=(hidden,), source=f"{ours}.enorm.weight")
    yield HfTensor(name=f"{hf}.hnorm.weight", shape=(hidden,), source=f"{ours}.hnorm.weight")
    yield HfTensor(name=f"{hf}.eh_proj.weight", shape=(hidden, 2 * hidden), source=f"{ours}.eh_proj.weight")
    yield from _block(config, hf=hf, ours=f"{ours}.block", dense=False)
    yield HfTensor(name=f"{hf}.shared_head.norm.weight", shape=(hidden,), source=f"{ours}.norm.weight")
    yield HfTensor(name=f"{hf}.shared_head.head.weight", shape=table, source="head.weight", role=copy)


def _block(config: ModelConfig, *, hf: str, ours: str, dense: bool) -> Iterator[HfTensor]:
    norm = (config.hidden_size,)
    yield HfTensor(name=f"{hf}.input_layernorm.weight", shape=norm, source=f"{ours}.attn_norm.weight")
    yield from _attention(config, hf=f"{hf}.self_attn", ours=f"{ours}.attn")
    yield HfTensor(name=f"{hf}.post_attention_layernorm.weight", shape=norm, source=f"{ours}.ffn_norm.weight")
    if dense:
        yield from _swiglu(
            config.hidden_size, config.dense_intermediate_size, hf=f"{hf}.mlp", ours=f"{ours}.ffn"
        )
    else:
        yield from _moe(config, hf=f"{hf}.mlp", ours=f"{ours}.ffn")


def _attention(config: ModelConfig, *, hf: str, ours: str) -> Iterator[HfTensor]:
    a, hidden = config.attention, config.hidden_size
    queries = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    keys_values = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    if a.q_lora_rank is None:
        shapes["q_proj", "wq"] = (queries, hidden)
    else:
        shapes["q_a_proj", "wq_a"] = (a.q_lora_rank, hidden)
        shapes["q_a_layernorm", "q_norm"] = (a.q_lora_rank,)
        shapes["q_b_proj", "wq_b"] = (queries, a.q_lora_rank)
    shapes["kv_a_proj_with_mqa", "wkv_a"] = (a.kv_lora_rank + a.qk_rope_head_dim, hidden)
    shapes["kv_a_layernorm", "kv_norm"] = (a.kv_lora_rank,)
    shapes["kv_b_proj", "wkv_b"] = (keys_values, a.kv_lora_rank)
    shapes["o_proj", "wo"] = (hidden, a.num_heads * a.v_head_dim)
    for (theirs, name), shape in shapes.items():
        role = Role.WEIGHT if theirs.endswith("layernorm") else Role.LINEAR
        yield HfTensor(name=f"{hf}.{theirs}.weight", shape=shape, source=f"{ours}.{name}.weight", role=role)


def _moe(config: ModelConfig, *, hf: str, ours: str) -> Iterator[HfTensor]:
    moe, hidden = config.moe, config.hidden_size
    gate = (moe.num_experts, hidden)
    yield HfTensor(name=f"{hf}.gate.weight", shape=gate, source=f"{ours}.gate.weight")
    yield HfTensor(
        name=f"{hf}.gate.e_score_correction_bias",
        shape=(moe.num_experts,),
        source=f"{ours}.gate.bias",
        role=Role.ROUTER_BIAS,
    )
    for expert in range(moe.num_experts):
        for theirs, name, shape in _projections(hidden, moe.intermediate_size):
            yield HfTensor(
                name=f"{hf}.experts.{expert}.{theirs}.weight",
                shape=shape,
                source=f"{ours}.experts.{name}",
                expert=expert,
                role=Role.LINEAR,
            )
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.intermediate_size
        yield from _swiglu(hidden, width, hf=f"{hf}.shared_experts", ours=f"{ours}.shared_experts")


def _swiglu(hidden: int, width: int, *, hf: str, ours: str) -> Iterator[HfTensor]:
    for theirs, name, shape in _projections(hidden, width):
        source = f"{ours}.{name}.weight"
        yield HfTensor(name=f"{hf}.{theirs}.weight", shape=shape, source=source, role=Role.LINEAR)


def _projections(hidden: int, width: int) -> list[tuple[str, str, tuple[int, int]]]:
    """Return (their name, our name, shape) of the three matrices of a SwiGLU."""
    return [
        ("gate_proj", "w1", (width, hidden)),
        ("up_proj", "w3", (width, hidden)),
        ("down_proj", "w2", (hidden, width)),
    ]
