"""The `config.json` of DeepSeek's open weights (`model_type: deepseek_v3`) to and from our configuration.

RoPE is written twice, with equal values: as `rope_theta` and `rope_scaling`, as the released file and the
serving engines have it, and as `rope_parameters`, as transformers 5 has it. Either is read. What the format
has no key for (balance loss, dropout, the length trained at) goes into a section `fathom` that others ignore.
Importable without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from model.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from model.errors import WeightsError

MODEL_TYPE = "deepseek_v3"

FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
"""Keys of the format that our model has no choice about. Absent ones mean the first value."""

MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "intermediate_size": "dense_intermediate_size",
    "num_nextn_predict_layers": "num_mtp_layers",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
ATTENTION_KEYS = {
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
MOE_KEYS = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "intermediate_size",
    "n_group": "num_groups",
    "topk_group": "top_k_groups",
    "routed_scaling_factor": "route_scale",
    "norm_topk_prob": "normalize_weights",
}
YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """What a `config.json` says about a model."""

    config: ModelConfig
    yarn: YarnConfig | None
    seq_len: int  # the length it was trained at, as far as the file says


FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
"""What `quantization_config` says about files that hold linear maps in FP8, as the released ones do."""


def to_hf_config(
    model: HfModel, *, dtype: str, eos_token_id: int | None, fp8: bool = False
) -> dict[str, Any]:
    """Return the `config.json` of `model`, whose weights are written as `dtype` (bfloat16, float32).

    fp8: whether the linear maps of its blocks are in FP8 instead.
    """
    config, yarn = model.config, model.yarn
    values: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": MODEL_TYPE}
    for section, keys in _sections(config):
        values |= {theirs: getattr(section, ours) for theirs, ours in keys.items()}
    values |= {key: allowed[0] for key, allowed in FIXED_KEYS.items()}
    theta = config.attention.rope_theta
    scaling = None if yarn is None else {theirs: getattr(yarn, ours) for theirs, ours in YARN_KEYS.items()}
    longest = model.seq_len if yarn is None else round(yarn.factor * yarn.original_length)
    return values | {
        "num_key_value_heads": config.attention.num_heads,
        "attention_dropout": 0.0,
        "max_position_embeddings": max(longest, model.seq_len),
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else {"type": "yarn", **scaling},
        "rope_parameters": {
            "rope_type": "default" if scaling is None else "yarn",
            "rope_theta": theta,
            **(scaling or {}),
        },
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
        "fathom": {
            "seq_len": model.seq_len,
            "balance_loss_weight": config.moe.balance_loss_weight,
            "dropout": config.dropout,
        },
        **({"quantization_config": FP8_BLOCKS} if fp8 else {}),
    }


def from_hf_config(values: Mapping[str, Any], *, path: str) -> HfModel:
    """Read a `config.json` into our configuration; WeightsError lists everything that `path` has wrong."""
    if values.get("model_type") != MODEL_TYPE:
        raise WeightsError(
            f"{path}: model_type={values.get('model_type')!r}, only {MODEL_TYPE!r} can be read"
        )
    problems = [
        f"{key}={values[key]!r} is not supported; only {allowed[0]!r} is"
        for key, allowed in FIXED_KEYS.items()
        if values.get(key, allowed[0]) not in allowed
    ]
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if shared not in (None, heads):
        problems.append(f"num_key_value_heads={shared} must equal num_attention_heads={heads}")
    if "num_nextn_predict_layers" not in values and "num_mtp_layers" in values:
        values = {**values, "num_nextn_predict_layers": values["num_mtp_layers"]}
    known = MODEL_KEYS | ATTENTION_KEYS | MOE_KEYS
    problems += [f"{key} is missing" for key in known if key not in values]
    problems += [
        f"{key}={values[key]!r} must be a number"
        for key in known
        if key in values and not isinstance(values[key], int | float) and key != "q_lora_rank"
    ]
    if problems:
        _refuse(path, problems)
    rope = _rope_parameters(values, path=path)
    own = values.get("fathom") or {}
    theta = float(rope["rope_theta"])
    attention = AttentionConfig(**_translate(values, ATTENTION_KEYS), rope_theta=theta)
    moe = MoEConfig(**_translate(values, MOE_KEYS), **_present(own, "balance_loss_weight"))
    config = ModelConfig(
        **_translate(values, MODEL_KEYS), attention=attention, moe=moe, **_present(own, "dropout")
    )
    yarn = _yarn(rope, path=path)
    problems = [
        *config.problems(),
        *attention.problems(),
        *moe.problems(),
        *(yarn.problems() if yarn else []),
    ]
    if problems:
        _refuse(path, problems)
    longest = values.get("max_position_embeddings", yarn.original_length if yarn else 4096)
    return HfModel(config=config, yarn=yarn, seq_len=int(own.get("seq_len", longest)))


def _sections(config: ModelConfig) -> list[tuple[object, dict[str, str]]]:
    return [(config, MODEL_KEYS), (config.attention, ATTENTION_KEYS), (config.moe, MOE_KEYS)]


def _translate(values: Mapping[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for theirs, ours in keys.items()}


def _present(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


def _rope_parameters(values: Mapping[str, Any], *, path: str) -> dict[str, Any]:
    """Return the RoPE settings in the form of transformers 5, from whichever form the file has."""
    parameters = dict(values.get("rope_parameters") or {})
    released = dict(values.get("rope_scaling") or {})
    theta = values.get("rope_theta", parameters.get("rope_theta", 10000.0))
    for form in (parameters, released):
        form["rope_type"] = form.get("rope_type", form.pop("type", "default"))
        form.pop("type", None)
        form.setdefault("rope_theta", theta)
    if values.get("rope_parameters") and values.get("rope_scaling") and parameters != released:
        _refuse(path, [f"rope_parameters={parameters} and rope_scaling={released} differ; keep one of them"])
    return parameters if values.get("rope_parameters") else released


def _yarn(rope: dict[str, Any], *, path: str) -> YarnConfig | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "yarn":
        _refuse(path, [f"rope type {rope['rope_type']!r} is not supported; only 'yarn' or none is"])
    required = ("factor", "original_max_position_embeddings")
    if missing := [f"rope_scaling.{key} is missing" for key in required if rope.get(key) is None]:
        _refuse(path, missing)
    unsupported = {"attention_factor": None, "truncate": True}
    if problems := [
        f"rope_scaling.{key}={rope[key]!r} is not supported; leave it out"
        for key, harmless in unsupported.items()
        if rope.get(key, harmless) != harmless
    ]:
        _refuse(path, problems)
    # A factor that a file does not give is a zero, not our default.
    given: dict[str, Any] = {"mscale": 0.0, "mscale_all_dim": 0.0}
    given |= {ours: rope[theirs] for theirs, ours in YARN_KEYS.items() if rope.get(theirs) is not None}
    return YarnConfig(**given)


def _refuse(path: str, problems: list[str]) -> NoReturn:
    raise WeightsError(f"{path} cannot be read:\n" + "\n".join(f"  {problem}" for problem in problems))
