"""Small models of V3's shape for tests, and how two tensors are compared."""

from torch import Tensor

from model.config import AttentionConfig, ModelConfig, MoEConfig


def small(**changes: object) -> ModelConfig:
    """Return a small model of V3's shape, with sizes of our own where given."""
    attention = {"num_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    attention |= {"qk_rope_head_dim": 4, "v_head_dim": 8}
    moe = {"num_experts": 8, "top_k": 2, "intermediate_size": 12, "num_groups": 4, "top_k_groups": 2}
    sizes: dict[str, object] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_dense_layers": 1}
    sizes |= {"dense_intermediate_size": 48, "num_mtp_layers": 0}
    for name, value in changes.items():
        if name in AttentionConfig.__dataclass_fields__:
            attention[name] = value  # type: ignore[assignment]
        elif name in MoEConfig.__dataclass_fields__:
            moe[name] = value  # type: ignore[assignment]
        else:
            sizes[name] = value
    config = ModelConfig(attention=AttentionConfig(**attention), moe=MoEConfig(**moe), **sizes)  # type: ignore[arg-type]
    assert not config.problems() + config.attention.problems() + config.moe.problems()
    return config


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs|."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-20)).item()
