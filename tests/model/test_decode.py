"""Decoding with cached latents and absorbed projections against the full forward pass.

Tolerance 1e-5 on logits of order 1 in FP32: prefill repeats the same operations, but absorbed decoding sums
over the latent where the ordinary path sums over the head width, so the last bits differ.
"""

import pytest
import torch
from torch import Tensor

from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig, YarnConfig
from model.decode import IncrementalDecoder
from model.init import initialize
from model.transformer import Transformer

YARN = YarnConfig(factor=4.0, original_length=8)
TOLERANCE = 1e-5


def make_model(
    *,
    num_dense_layers: int = 1,
    num_layers: int = 3,
    num_mtp_layers: int = 0,
    q_lora_rank: int | None = 12,
    yarn: YarnConfig | None = None,
    vocab_size: int = 61,
    compute: Compute = Compute.fp32,
) -> Transformer:
    """A tiny model with large weights, so that attention and routing are far from uniform."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=num_layers,
        num_dense_layers=num_dense_layers,
        dense_intermediate_size=48,
        attention=AttentionConfig(
            num_heads=3,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=20,
            qk_nope_head_dim=10,
            qk_rope_head_dim=6,
            v_head_dim=14,
        ),
        moe=MoEConfig(num_experts=8, top_k=3, intermediate_size=24, num_groups=4, top_k_groups=2),
        num_mtp_layers=num_mtp_layers,
        init_std=0.2,
    )
    model = Transformer(config, yarn=yarn, compute=compute)
    initialize(model, seed=3)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """The main model's logits [B, S, V] by the ordinary forward pass, nothing cached."""
    depths = 1 + model.config.num_mtp_layers
    tokens_BKS = tokens_BS[:, None].expand(-1, depths, -1)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return model.head(model(tokens_BKS, positions_BS).hidden_KBSD[0]).float()


VARIANTS = {
    "moe": {},
    "dense": {"num_dense_layers": 3},
    "yarn": {"yarn": YARN},
    "dense-yarn": {"num_dense_layers": 3, "yarn": YARN},
    "direct-queries": {"q_lora_rank": None, "yarn": YARN},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 1, 1, 4, 7], [1, 19]])
def test_any_split_into_calls_gives_the_full_logits(variant: str, cuts: list[int]) -> None:
    model = make_model(**VARIANTS[variant])
    tokens = random_tokens(2, 20)
    decoder = IncrementalDecoder(model, num_sequences=2, max_length=20)
    logits = torch.cat([decoder.logits(decoder.run(part)) for part in tokens.split(cuts, dim=1)], dim=1)
    expected = full_logits(model, tokens)
    assert expected.abs().mean() > 0.1  # the tolerance means something
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert decoder.cache.lengths == [20, 20]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_of_different_lengths_share_a_batch(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    lengths = [9, 3, 14]
    tokens = random_tokens(3, 18)
    padded = tokens[:, :14].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 60
    decoder = IncrementalDecoder(model, num_sequences=3, max_length=18)
    decoder.run(padded, lengths=lengths)
    assert decoder.cache.lengths == lengths
    for step in range(4):
        column = torch.stack([tokens[row, length + step] for row, length in enumerate(lengths)])
        logits = decoder.logits(decoder.run(column[:, None]))
        for row, length in enumerate(lengths):
            expected = full_logits(model, tokens[row : row + 1, : length + step + 1])[0, -1]
            torch.testing.assert_close(logits[row, 0], expected, rtol=0, atol=TOLERANCE)


def test_forgotten_tokens_leave_no_trace() -> None:
    model = make_model(yarn=YARN)
    tokens, wrong = random_tokens(1, 16), random_tokens(1, 5, seed=1)
    decoder = IncrementalDecoder(model, max_length=16)
    decoder.run(tokens[:, :8])
    decoder.run(wrong)
    decoder.cache.truncate([8])
    logits = decoder.logits(decoder.run(tokens[:, 8:10]))
    torch.testing.assert_close(logits, full_logits(model, tokens)[:, 8:10], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_see_the_text_and_themselves_only(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    text, branches = random_tokens(1, 9), random_tokens(3, 4, seed=1)
    decoder = IncrementalDecoder(model, max_length=9 + 12)
    decoder.run(text)
    for _ in range(2):  # nothing of the first time is left behind
        logits = decoder.logits(decoder.run_branches(branches))
        for branch, got in zip(branches, logits, strict=True):
            expected = full_logits(model, torch.cat((text[0], branch))[None])[0, 9:]
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
        assert decoder.cache.lengths == [9]


def test_mtp_depths_repeat_the_models_own_forward() -> None:
    model = make_model(num_mtp_layers=2, yarn=YARN)
    tokens = random_tokens(2, 14)
    tokens_BKS = tokens.unfold(1, 12, 1)[:, :3]
    positions = torch.arange(12).expand(2, 12)
    with torch.no_grad():
        main, first, second = model(tokens_BKS, positions).hidden_KBSD
    decoder = IncrementalDecoder(model, num_sequences=2, max_length=12)
    hidden = {0: decoder.run(tokens_BKS[:, 0])}
    torch.testing.assert_close(hidden[0], main, rtol=0, atol=TOLERANCE)
    for depth, expected in ((1, first), (2, second)):
        parts = [
            decoder.run_mtp(depth, hidden[depth - 1][:, a:b], tokens_BKS[:, depth, a:b], start=a)
            for a, b in ((0, 7), (7, 8), (8, 12))
        ]
        hidden[depth] = torch.cat(parts, dim=1)
        torch.testing.assert_close(hidden[depth], expected, rtol=0, atol=TOLERANCE)
        assert decoder.mtp_caches[depth - 1].lengths == [12, 12]


def test_bf16_is_cached_and_decoded_in_bf16() -> None:
    model = make_model(compute=Compute.bf16, yarn=YARN)
    tokens = random_tokens(1, 12)
    decoder = IncrementalDecoder(model, max_length=12)
    assert decoder.cache.read(0, 1).dtype == torch.bfloat16
    logits = torch.cat([decoder.logits(decoder.run(part)) for part in tokens.split(3, dim=1)], dim=1)
    assert logits.dtype == torch.float32
    # 8 significant bits and three layers; a wrong position or scale would be off by the logits' own size
    expected = full_logits(model, tokens)
    assert (logits - expected).norm() < 0.05 * expected.norm()
