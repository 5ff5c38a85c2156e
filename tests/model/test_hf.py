"""The name map against transformers' own parameter tree, the released file's layout and our own model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, DeepseekV3Config, DeepseekV3ForCausalLM

from model.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from model.errors import WeightsError
from model.hf import Role, hf_tensors, is_mtp_tensor, source_shapes
from model.hf_config import HfModel, from_hf_config, to_hf_config
from model.transformer import Transformer

ATTENTION = AttentionConfig(
    num_heads=3, q_lora_rank=10, kv_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
DIRECT = AttentionConfig(
    num_heads=2, q_lora_rank=None, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=7
)
MOE = MoEConfig(num_experts=8, top_k=3, intermediate_size=11, num_groups=4, top_k_groups=2)
TWO_SHARED = MoEConfig(
    num_experts=6, num_shared_experts=2, top_k=2, intermediate_size=9, num_groups=1, top_k_groups=1
)


def tiny(
    attention: AttentionConfig = ATTENTION, moe: MoEConfig = MOE, dense: int = 1, mtp: int = 1
) -> ModelConfig:
    return ModelConfig(
        vocab_size=97,
        hidden_size=24,
        num_layers=3,
        num_dense_layers=dense,
        dense_intermediate_size=40,
        attention=attention,
        moe=moe,
        num_mtp_layers=mtp,
    )


CONFIGS = [tiny(), tiny(DIRECT), tiny(moe=TWO_SHARED, mtp=2), tiny(dense=3), tiny(dense=0, mtp=0)]

RELEASED_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""The keys and values of the open weights' config.json, without quantisation."""


@pytest.mark.parametrize("config", CONFIGS)
def test_sources_are_exactly_the_state_of_our_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert source_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_main_model_has_the_tensors_of_transformers(config: ModelConfig, tmp_path: Path) -> None:
    """Build their model from our config.json; its stacked experts are the only difference in layout."""
    values = to_hf_config(HfModel(config=config, yarn=None, seq_len=64), dtype="float32", eos_token_id=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        theirs = DeepseekV3ForCausalLM(AutoConfig.from_pretrained(tmp_path)).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items() if ".experts." not in name}
    main = [tensor for tensor in hf_tensors(config) if not is_mtp_tensor(tensor.name, config)]
    assert {t.name: t.shape for t in main if ".experts." not in t.name} == expected

    moe = config.moe
    per_expert = [t.shape for t in main if ".experts." in t.name]
    stacked = [tuple(tensor.shape) for name, tensor in theirs.items() if ".experts." in name]
    gate_up = (2 * moe.intermediate_size, config.hidden_size)
    assert stacked.count((moe.num_experts, *gate_up)) == config.num_layers - config.num_dense_layers
    assert len(per_expert) == 3 * moe.num_experts * (config.num_layers - config.num_dense_layers)


def test_released_layout() -> None:
    """The open weights hold 61 layers, one MTP module as layer 61, and 256 experts in each of 59 blocks."""
    tensors = {tensor.name: tensor for tensor in hf_tensors(ModelConfig())}
    assert len(tensors) == len(hf_tensors(ModelConfig()))
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 7168)
    assert tensors["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert tensors["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert tensors["model.layers.61.embed_tokens.weight"].role is Role.COPY
    assert tensors["model.layers.61.shared_head.head.weight"].source == "head.weight"
    assert tensors["model.layers.61.shared_head.norm.weight"].source == "mtp.0.norm.weight"
    bias = tensors["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert (bias.role, bias.source, bias.shape) == (Role.ROUTER_BIAS, "layers.3.ffn.gate.bias", (256,))
    assert len([name for name in tensors if ".experts." in name]) == 59 * 256 * 3


def test_every_slice_of_ours_is_written_once() -> None:
    config = tiny(mtp=2)
    places = [(t.source, t.expert) for t in hf_tensors(config) if t.role is not Role.COPY]
    assert len(places) == len(set(places))


def test_the_released_config_is_deepseek_v3() -> None:
    model = from_hf_config(RELEASED_CONFIG, path="config.json")
    assert model.config == ModelConfig(init_std=0.02)
    assert model.yarn == YarnConfig()
    assert model.seq_len == 163840


def test_the_released_config_is_written_back() -> None:
    model = from_hf_config(RELEASED_CONFIG, path="config.json")
    written = to_hf_config(model, dtype="bfloat16", eos_token_id=1)
    special = {"bos_token_id"}  # a run has no token that begins a sequence
    assert {key: written[key] for key in RELEASED_CONFIG if key not in special} == {
        key: value for key, value in RELEASED_CONFIG.items() if key not in special
    }


@given(
    yarn=st.none()
    | st.builds(
        YarnConfig,
        factor=st.sampled_from([1.0, 2.5, 40.0]),
        original_length=st.sampled_from([128, 4096]),
        beta_fast=st.sampled_from([16.0, 32.0]),
        beta_slow=st.sampled_from([0.5, 1.0]),
        mscale=st.sampled_from([0.0, 0.707, 1.0]),
        mscale_all_dim=st.sampled_from([0.0, 0.707, 1.0]),
    ),
    config=st.sampled_from(CONFIGS),
    seq_len=st.sampled_from([64, 4096]),
    alpha=st.sampled_from([0.0, 0.001]),
)
@settings(max_examples=60, deadline=None)
def test_config_round_trip(yarn: YarnConfig | None, config: ModelConfig, seq_len: int, alpha: float) -> None:
    config = replace(config, moe=replace(config.moe, balance_loss_weight=alpha))
    model = HfModel(config=config, yarn=yarn, seq_len=seq_len)
    values = json.loads(json.dumps(to_hf_config(model, dtype="float32", eos_token_id=3)))
    assert from_hf_config(values, path="config.json") == model


@pytest.mark.parametrize("yarn", [None, YarnConfig(factor=8.0, original_length=64, mscale_all_dim=0.0)])
def test_config_survives_transformers(yarn: YarnConfig | None, tmp_path: Path) -> None:
    """transformers reads it, keeps the routing, and what it saves again is still the same model to us."""
    config = tiny()
    model = HfModel(config=config, yarn=yarn, seq_len=512)
    values = to_hf_config(model, dtype="float32", eos_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, DeepseekV3Config)
    assert theirs.num_nextn_predict_layers == 1
    assert theirs.rope_parameters["rope_theta"] == config.attention.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("default" if yarn is None else "yarn")
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert from_hf_config(again, path="config.json") == model


def test_either_form_of_rope_is_enough() -> None:
    both = to_hf_config(
        HfModel(config=tiny(), yarn=YarnConfig(), seq_len=64), dtype="float32", eos_token_id=None
    )
    released = {key: value for key, value in both.items() if key != "rope_parameters"}
    modern = {key: value for key, value in both.items() if key not in ("rope_scaling", "rope_theta")}
    assert (
        from_hf_config(released, path="c")
        == from_hf_config(modern, path="c")
        == from_hf_config(both, path="c")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 must equal"),
        ({"hidden_size": "big"}, "hidden_size='big' must be a number"),
        ({"n_group": 7}, "num_groups=7 must divide"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": RELEASED_CONFIG["rope_scaling"] | {"attention_factor": 2.0}},
            "attention_factor=2.0",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "differ"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsError, match=r"config\.json") as error:
        from_hf_config(RELEASED_CONFIG | change, path="config.json")
    assert words in str(error.value)


def test_factors_that_a_file_leaves_out_are_zero() -> None:
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    yarn = from_hf_config(RELEASED_CONFIG | {"rope_scaling": scaling}, path="c").yarn
    assert yarn == YarnConfig(mscale=0.0, mscale_all_dim=0.0)


def test_all_problems_of_a_config_are_named_at_once() -> None:
    broken = {key: value for key, value in RELEASED_CONFIG.items() if key != "v_head_dim"}
    with pytest.raises(WeightsError) as error:
        from_hf_config(broken | {"hidden_act": "gelu"}, path="config.json")
    assert "v_head_dim is missing" in str(error.value)
    assert "hidden_act='gelu'" in str(error.value)
