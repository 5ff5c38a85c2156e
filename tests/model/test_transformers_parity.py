"""The whole model against transformers' DeepseekV3ForCausalLM with the same weights, in FP32."""

import pytest
import torch

from model.config import ModelConfig, YarnConfig
from model.transformer import Transformer
from tests.model.oracle import oracle_of, randomize, to_theirs
from tests.model.small import relative, small

TOLERANCE = 1e-5


YARN = YarnConfig(factor=40, original_length=16)
CASES: dict[str, tuple[ModelConfig, YarnConfig | None]] = {
    "v3": (small(), None),
    "v3 with yarn": (small(), YARN),
    "yarn at factor 1": (small(), YarnConfig(factor=1, original_length=16)),
    "yarn with unequal mscale": (small(), YarnConfig(factor=8, original_length=16, mscale=0.7)),
    "yarn without mscale": (
        small(),
        YarnConfig(factor=8, original_length=16, mscale=0.0, mscale_all_dim=0.0),
    ),
    "queries uncompressed": (small(q_lora_rank=None), None),
    "queries uncompressed, yarn": (small(q_lora_rank=None), YARN),
    "no expert groups, all chosen": (small(num_groups=1, top_k_groups=1, top_k=8), None),
    "no expert groups": (small(num_groups=1, top_k_groups=1, top_k=3), None),
    "two shared experts": (small(num_shared_experts=2, route_scale=1.0), None),
    "weights not normalised": (small(normalize_weights=False), None),
    "dense only": (small(num_dense_layers=3), None),
    "experts only": (small(num_dense_layers=0, num_layers=1, norm_eps=1e-3), None),
    "odd sizes": (
        small(
            vocab_size=61,
            hidden_size=27,
            dense_intermediate_size=35,
            num_heads=3,
            q_lora_rank=11,
            kv_lora_rank=13,
            qk_nope_head_dim=5,
            qk_rope_head_dim=6,
            v_head_dim=7,
            num_experts=15,
            num_groups=5,
            top_k_groups=3,
            top_k=5,
            intermediate_size=9,
        ),
        YARN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case: str) -> None:
    config, yarn = CASES[case]
    model = Transformer(config, yarn=yarn)
    randomize(model, seed=1)
    theirs, _ = oracle_of(model, yarn)
    tokens_BS = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(2))
    output = model(tokens_BS[:, None], torch.arange(24).expand(2, -1))
    logits = model.head(output.hidden_KBSD[0])
    expected = theirs(tokens_BS, use_cache=False).logits
    assert relative(logits, expected) < TOLERANCE

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    ours = to_theirs({name: g for name, g in gradients.items() if g is not None}, model)
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient is not None, name
        assert relative(ours[name], gradient) < TOLERANCE, name
