"""Rotation tables against transformers' and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)

from model.config import YarnConfig
from model.rope import RotaryEmbedding, apply_rope, inverse_frequencies, softmax_scale, table_scale
from tests.model.oracle import oracle_config
from tests.model.small import small

SETTINGS = [
    None,
    YarnConfig(),
    YarnConfig(factor=1.0),
    YarnConfig(factor=40, original_length=128),
    YarnConfig(factor=4, original_length=4096, mscale=0.5),
    YarnConfig(factor=4, original_length=4096, mscale=0.0, mscale_all_dim=0.0),
    YarnConfig(factor=4, original_length=4096, mscale_all_dim=0.0),
    YarnConfig(factor=16, original_length=64, beta_fast=4, beta_slow=2),
]


@pytest.mark.parametrize("yarn", SETTINGS)
@pytest.mark.parametrize("width", [2, 64])
def test_tables_equal_transformers_bit_for_bit(yarn: YarnConfig | None, width: int) -> None:
    config = small(qk_rope_head_dim=width)
    theirs = DeepseekV3RotaryEmbedding(oracle_config(config, yarn))
    positions_BS = torch.tensor([[0, 1, 2, 127, 128], [4095, 4096, 5000, 100_000, 131_071]])
    cos, sin = theirs(torch.zeros(1), positions_BS)
    table_BS2F = RotaryEmbedding(config.attention, yarn)(positions_BS)
    assert table_BS2F.dtype == torch.float32
    assert torch.equal(table_BS2F[:, :, 0], cos[..., : width // 2])
    assert torch.equal(table_BS2F[:, :, 1], sin[..., : width // 2])


def test_yarn_acts_also_while_sequences_have_the_original_length() -> None:
    """A training length equal to the original one switches YaRN off in other trainers."""
    config, yarn = small(qk_rope_head_dim=64), YarnConfig(factor=40, original_length=4096)
    theirs = oracle_config(config, yarn)
    theirs.max_position_embeddings = 4096
    expected = DeepseekV3RotaryEmbedding(theirs).inv_freq
    ours = inverse_frequencies(config.attention, yarn)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, inverse_frequencies(config.attention, None))


@pytest.mark.parametrize("yarn", SETTINGS)
def test_softmax_scale_equals_transformers(yarn: YarnConfig | None) -> None:
    config = small()
    theirs = DeepseekV3Attention(oracle_config(config, yarn), 0)
    assert softmax_scale(config.attention, yarn) == pytest.approx(theirs.scaling, rel=1e-15)


def test_published_yarn_values() -> None:
    config, yarn = small(qk_nope_head_dim=128, qk_rope_head_dim=64), YarnConfig()
    temperature = 0.1 * math.log(40) + 1
    assert softmax_scale(config.attention, yarn) == pytest.approx(192**-0.5 * temperature**2)
    assert table_scale(yarn) == 1.0
    plain_F = inverse_frequencies(config.attention, None)
    ratio_F = inverse_frequencies(config.attention, yarn) / plain_F
    torch.testing.assert_close(ratio_F[0], torch.tensor(1.0))
    torch.testing.assert_close(ratio_F[-1], torch.tensor(1 / 40))
    assert (ratio_F.diff() <= 1e-7).all()


@settings(max_examples=40, deadline=None)
@given(
    factor=st.floats(1, 100),
    length=st.integers(1, 100_000),
    slow=st.floats(0.1, 8),
    gap=st.floats(0.01, 60),
    mscales=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    half=st.integers(1, 40),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
)
def test_any_setting_equals_transformers(
    factor: float,
    length: int,
    slow: float,
    gap: float,
    mscales: tuple[float, float],
    half: int,
    theta: float,
) -> None:
    yarn = YarnConfig(
        factor=factor,
        original_length=length,
        beta_fast=slow + gap,
        beta_slow=slow,
        mscale=mscales[0],
        mscale_all_dim=mscales[1],
    )
    config = small(qk_rope_head_dim=2 * half, rope_theta=theta)
    theirs = DeepseekV3RotaryEmbedding(oracle_config(config, yarn))
    assert torch.equal(inverse_frequencies(config.attention, yarn), theirs.inv_freq)
    assert table_scale(yarn) == pytest.approx(theirs.attention_scaling, rel=1e-15)


def test_pairs_rotate_as_complex_numbers_and_as_transformers() -> None:
    config = small(qk_rope_head_dim=6)
    x_BSHP = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(0))
    positions_BS = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 20, 30, 41]])
    rotated = apply_rope(x_BSHP, RotaryEmbedding(config.attention, None)(positions_BS))
    angles = positions_BS[..., None].double() * inverse_frequencies(config.attention, None).double()
    turned = torch.view_as_complex(x_BSHP.double().unflatten(-1, (3, 2))) * torch.exp(1j * angles)[:, :, None]
    torch.testing.assert_close(rotated.double(), torch.view_as_real(turned).flatten(-2), atol=1e-5, rtol=1e-5)

    cos, sin = DeepseekV3RotaryEmbedding(oracle_config(config, None))(x_BSHP, positions_BS)
    theirs, _ = apply_rotary_pos_emb_interleave(x_BSHP, x_BSHP, cos, sin, unsqueeze_dim=2)
    # transformers leaves the first members of all pairs, then the second ones
    torch.testing.assert_close(torch.cat((rotated[..., 0::2], rotated[..., 1::2]), -1), theirs)


def test_scores_depend_on_distance_only() -> None:
    config = small(qk_rope_head_dim=8)
    rope = RotaryEmbedding(config.attention, YarnConfig(factor=4, original_length=32))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1)).unbind(0)

    def score(query: int, key: int) -> torch.Tensor:
        return (
            apply_rope(q, rope(torch.tensor([[query]]))) * apply_rope(k, rope(torch.tensor([[key]])))
        ).sum()

    torch.testing.assert_close(score(3, 1), score(203, 201), atol=1e-4, rtol=1e-4)
    assert abs(score(3, 1) - score(13, 1)) > 1e-3


def test_switching_the_setting_equals_building_with_it() -> None:
    attention = small().attention
    rope, positions_BS = RotaryEmbedding(attention, None), torch.arange(50)[None]
    plain = rope(positions_BS)
    rope.set_yarn(YarnConfig(factor=8, original_length=16))
    expected = RotaryEmbedding(attention, YarnConfig(factor=8, original_length=16))(positions_BS)
    assert torch.equal(rope(positions_BS), expected)
    assert not torch.equal(expected, plain)
    rope.set_yarn(None)
    assert torch.equal(rope(positions_BS), plain)
