"""The closed forms against DeepSeek-V3's published figures and against models built for real."""

import subprocess
import sys

import pytest
import torch

from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig
from model.cost import (
    active_mtp_parameters,
    active_parameters,
    block_input_bytes_per_token,
    down_projections,
    flops_per_token,
    gradient_bytes,
    head_flops_per_token,
    latent_cache_bytes_per_token,
    layer_flops_per_token,
    layer_parameters,
    main_flops_per_token,
    mtp_parameters,
    num_moe_layers,
    num_parameters,
    optimizer_bytes,
    parameter_bytes,
    parameters,
)
from model.transformer import Transformer

V3 = ModelConfig()


def tiny(**changes: object) -> ModelConfig:
    """Return a model whose sizes are all different, so that no two terms can be swapped unnoticed."""
    sizes: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 24,
        "num_layers": 3,
        "num_dense_layers": 1,
        "dense_intermediate_size": 40,
        "attention": AttentionConfig(
            num_heads=3,
            q_lora_rank=10,
            kv_lora_rank=14,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
        ),
        "moe": MoEConfig(num_experts=8, top_k=3, intermediate_size=11, num_groups=4, top_k_groups=2),
        "num_mtp_layers": 1,
    }
    return ModelConfig(**(sizes | changes))  # type: ignore[arg-type]  # a dict of mixed fields


def direct_queries() -> AttentionConfig:
    return AttentionConfig(
        num_heads=2, q_lora_rank=None, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=7
    )


CONFIGS = {
    "tiny": tiny(),
    "no mtp": tiny(num_mtp_layers=0),
    "three depths": tiny(num_mtp_layers=3),
    "direct queries": tiny(attention=direct_queries()),
    "dense only": tiny(num_dense_layers=3, num_mtp_layers=0),
    "dense only with mtp": tiny(num_dense_layers=3),
    "no dense": tiny(num_dense_layers=0),
    "two shared experts": tiny(
        moe=MoEConfig(
            num_experts=6, num_shared_experts=2, top_k=2, intermediate_size=9, num_groups=1, top_k_groups=1
        )
    ),
    "no shared expert": tiny(
        moe=MoEConfig(
            num_experts=4, num_shared_experts=0, top_k=1, intermediate_size=13, num_groups=2, top_k_groups=1
        )
    ),
}


def test_deepseek_v3_has_the_published_number_of_parameters() -> None:
    assert parameters(V3).total == pytest.approx(671.03e9, rel=1e-5)
    assert active_parameters(V3).without_embedding == pytest.approx(36.62e9, rel=5e-4)
    assert active_parameters(V3).total == pytest.approx(37e9, rel=0.02)
    with_head = active_mtp_parameters(V3).total + V3.vocab_size * V3.hidden_size
    assert with_head == pytest.approx(1.61e9, rel=5e-3)


@pytest.mark.parametrize(("seq_len", "gflop"), [(4096, 250.4), (32768, 465.0), (131072, 1202.0)])
def test_deepseek_v3_flops_without_mtp(seq_len: int, gflop: float) -> None:
    assert main_flops_per_token(V3, seq_len) == pytest.approx(gflop * 1e9, rel=5e-3)
    assert flops_per_token(ModelConfig(num_mtp_layers=0), seq_len) == main_flops_per_token(V3, seq_len)


def test_deepseek_v3_flops_with_one_mtp_module() -> None:
    assert flops_per_token(V3, 4096) == pytest.approx(260.6e9, rel=5e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameter_count_is_that_of_the_real_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        real = Transformer(config, compute=Compute.bf16)
    sizes = {name: parameter.numel() for name, parameter in real.named_parameters()}
    in_mtp = sum(count for name, count in sizes.items() if name.startswith("mtp."))

    assert mtp_parameters(config).total == in_mtp
    assert parameters(config).total == sum(sizes.values()) - in_mtp
    assert num_parameters(config) == sum(sizes.values())
    assert parameters(config).embedding == sizes["embed.weight"]
    assert parameters(config).head == sizes["head.weight"]
    counted = parameters(config) + mtp_parameters(config)
    assert counted.norms == sum(n for name, n in sizes.items() if "norm" in name)
    assert counted.mtp_projection == sum(n for name, n in sizes.items() if ".eh_proj." in name)
    to_latents = ("layers.0.attn.wq_a.weight", "layers.0.attn.wkv_a.weight")  # without a query latent, one
    assert down_projections(config) == sum(sizes.get(name, 0) for name in to_latents)
    assert counted.gate == sum(n for name, n in sizes.items() if ".gate." in name)
    assert counted.routed_experts == sum(n for name, n in sizes.items() if ".experts." in name)
    assert counted.shared_experts == sum(n for name, n in sizes.items() if ".shared_experts." in name)


@pytest.mark.parametrize("compute", [Compute.bf16, Compute.fp32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_bytes_are_those_of_the_real_model(config: ModelConfig, compute: Compute) -> None:
    with torch.device("meta"):
        real = Transformer(config, compute=compute)
    assert parameter_bytes(config, compute=compute) == sum(
        tensor.numel() * tensor.element_size() for tensor in real.state_dict().values()
    )
    count = sum(p.numel() for p in real.parameters())
    half = sum(p.numel() for p in real.parameters() if p.dtype is not torch.float32)
    assert gradient_bytes(config) == 4 * count
    assert optimizer_bytes(config, compute=compute, moment_bytes=2) == 4 * half + 2 * 2 * count


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_flops_are_those_of_the_products_a_token_enters(config: ModelConfig) -> None:
    """Count by hand, weight by weight, over the shapes of the real model."""
    seq_len = 20
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    forward = 0
    for name, shape in shapes.items():
        if name == "embed.weight" or len(shape) == 1:
            continue
        if len(shape) == 3:  # of the stacked experts a token meets top_k
            forward += 2 * config.moe.top_k * shape[1] * shape[2]
        elif name == "head.weight":
            forward += 2 * (1 + config.num_mtp_layers) * shape[0] * shape[1]
        else:
            forward += 2 * shape[0] * shape[1]
    a = config.attention
    for _ in range(config.num_layers + config.num_mtp_layers):
        scores = 2 * a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim) * seq_len
        forward += (scores + 2 * a.num_heads * a.v_head_dim * seq_len) // 2  # the causal half
    assert flops_per_token(config, seq_len) == 3 * forward


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_layers_and_head_make_up_the_main_model(config: ModelConfig) -> None:
    """The placement of layers on stages weighs them one by one."""
    layers = range(config.num_layers)
    parts = sum(layer_parameters(config, layer).total for layer in layers)
    ends = parameters(config).embedding + parameters(config).head + config.hidden_size
    assert parts + ends == parameters(config).total
    flops = sum(layer_flops_per_token(config, layer, 20) for layer in layers)
    assert flops + head_flops_per_token(config) == main_flops_per_token(config, 20)


def test_latent_cache_of_deepseek_v3_is_576_numbers_per_layer_and_token() -> None:
    assert latent_cache_bytes_per_token(V3, compute=Compute.bf16) == 61 * (512 + 64) * 2
    assert latent_cache_bytes_per_token(V3, compute=Compute.fp32) == 61 * (512 + 64) * 4


def test_full_recompute_keeps_one_hidden_state_per_block() -> None:
    assert block_input_bytes_per_token(V3, compute=Compute.bf16) == 62 * 7168 * 2


def test_every_mtp_block_has_a_router() -> None:
    assert num_moe_layers(V3) == 58 + 1
    assert num_moe_layers(tiny(num_dense_layers=3)) == 1


def test_imports_without_torch() -> None:
    code = "import sys, model.cost, model.hf, model.hf_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
