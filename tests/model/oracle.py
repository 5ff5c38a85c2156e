"""The reference implementation: transformers' DeepseekV3ForCausalLM and its MTP layers, with our weights.

Names and shapes are mapped here a second time, on purpose: a shared mapping would hide its own mistakes.
"""

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from model.config import ModelConfig, YarnConfig
from model.init import initialize
from model.transformer import Transformer

ATTENTION = {
    "wq.weight": "q_proj.weight",
    "wq_a.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_layernorm.weight",
    "wq_b.weight": "q_b_proj.weight",
    "wkv_a.weight": "kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "wkv_b.weight": "kv_b_proj.weight",
    "wo.weight": "o_proj.weight",
}
FEED_FORWARD = {
    "w1.weight": "gate_proj.weight",
    "w3.weight": "up_proj.weight",
    "w2.weight": "down_proj.weight",
}


def oracle_config(config: ModelConfig, yarn: YarnConfig | None) -> DeepseekV3Config:
    """Return the configuration of the same model in transformers' terms."""
    attention, moe = config.attention, config.moe
    rope: dict[str, float | int | str] = {"rope_type": "default", "rope_theta": attention.rope_theta}
    length = 4096
    if yarn is not None:
        length = int(yarn.original_length * yarn.factor)
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.dense_intermediate_size,
        moe_intermediate_size=moe.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        n_shared_experts=moe.num_shared_experts,
        n_routed_experts=moe.num_experts,
        routed_scaling_factor=moe.route_scale,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=attention.q_lora_rank,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        v_head_dim=attention.v_head_dim,
        n_group=moe.num_groups,
        topk_group=moe.top_k_groups,
        num_experts_per_tok=moe.top_k,
        first_k_dense_replace=config.num_dense_layers,
        norm_topk_prob=moe.normalize_weights,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=length,
        rope_parameters=rope,
        num_mtp_layers=config.num_mtp_layers,
        attn_implementation="eager",
        experts_implementation="eager",
        tie_word_embeddings=False,
    )


def randomize(model: Transformer, *, seed: int) -> None:
    """Initialise with weights large enough that every part matters, norms away from 1, biases away from 0."""
    initialize(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                width = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width**-0.5)
        for router in model.routers().values():
            router.bias.copy_(0.1 * torch.randn(router.bias.shape, generator=generator))


def block_names(ours: str, theirs: str, model: Transformer) -> dict[str, str]:
    """Return our name -> their name for the unfused tensors of one decoder layer."""
    names = {
        f"{ours}.attn_norm.weight": f"{theirs}.input_layernorm.weight",
        f"{ours}.ffn_norm.weight": f"{theirs}.post_attention_layernorm.weight",
        f"{ours}.ffn.gate.weight": f"{theirs}.mlp.gate.weight",
        f"{ours}.ffn.gate.bias": f"{theirs}.mlp.gate.e_score_correction_bias",
        f"{ours}.ffn.experts.w2": f"{theirs}.mlp.experts.down_proj",
    }
    names |= {f"{ours}.attn.{k}": f"{theirs}.self_attn.{v}" for k, v in ATTENTION.items()}
    for ffn, mlp in (("ffn", "mlp"), ("ffn.shared_experts", "mlp.shared_experts")):
        names |= {f"{ours}.{ffn}.{k}": f"{theirs}.{mlp}.{v}" for k, v in FEED_FORWARD.items()}
    held = model.state_dict()
    return {k: v for k, v in names.items() if k in held}


def to_theirs(tensors: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """Rename weights or gradients of ours to those of transformers; MTP layers as `mtp.{k}`."""
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    places = {f"layers.{i}": f"model.layers.{i}" for i in range(model.config.num_layers)}
    places |= {f"mtp.{k}.block": f"mtp.{k}.mtp_block" for k in range(model.config.num_mtp_layers)}
    for ours, theirs in places.items():
        names |= block_names(ours, theirs, model)
    for k in range(model.config.num_mtp_layers):
        names |= {
            f"mtp.{k}.{part}.weight": f"mtp.{k}.{part}.weight" for part in ("enorm", "hnorm", "eh_proj")
        }
        names[f"mtp.{k}.norm.weight"] = f"mtp.{k}.post_norm.weight"
    renamed = {theirs: tensors[ours] for ours, theirs in names.items() if ours in tensors}
    for ours, theirs in places.items():
        if f"{ours}.ffn.experts.w1" in tensors:
            pair = (tensors[f"{ours}.ffn.experts.w1"], tensors[f"{ours}.ffn.experts.w3"])
            renamed[f"{theirs}.mlp.experts.gate_up_proj"] = torch.cat(pair, dim=1)
    fused = sum(2 for name in tensors if name.endswith("experts.w1"))
    singles = len(renamed) - fused // 2
    if singles + fused != len(tensors):
        raise ValueError(f"{len(tensors)} tensors of ours, but only {singles + fused} were mapped")
    return renamed


def oracle_of(model: Transformer, yarn: YarnConfig | None) -> tuple[DeepseekV3ForCausalLM, MtpModel | None]:
    """Return transformers' model, and its MTP layers if there are any, with the weights of `model`."""
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(oracle_config(model.config, yarn)).float().train()
    tensors = to_theirs(model.state_dict(), model)
    main = {k: v.clone() for k, v in tensors.items() if not k.startswith("mtp.")}
    theirs.load_state_dict(main, strict=True)
    if not model.config.num_mtp_layers:
        return theirs, None
    mtp = MtpModel(theirs, model.config.num_mtp_layers).float().train()
    layers = {k.removeprefix("mtp."): v.clone() for k, v in tensors.items() if k.startswith("mtp.")}
    mtp.layers.load_state_dict(layers, strict=True)
    return theirs, mtp
