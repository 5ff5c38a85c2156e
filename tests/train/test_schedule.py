"""Schedules against the published corner values, closed forms and a step-by-step walk."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import BatchConfig, Curve, LrConfig, LrPiece, StageConfig, StepsConfig
from train.schedule import batch_size_at, lr_at, num_steps, piece_ends, steps_value

T = 1_000_000_000_000
V3_TOKENS = 14_800_000_000_000
V3_LR = LrConfig(
    peak=2.2e-4,
    warmup_steps=2000,
    pieces=[
        LrPiece(until_tokens=10 * T),
        LrPiece(curve=Curve.cosine, to=2.2e-5, until_tokens=14_300_000_000_000),
        LrPiece(until_tokens=14_633_000_000_000),
        LrPiece(to=7.3e-6),
    ],
)
V3_BATCH = BatchConfig(start=3072, end=15360, ramp_tokens=469_000_000_000, multiple_of=64)


def v3_lr(tokens: int, step: int = 1_000_000) -> float:
    return lr_at(V3_LR, step=step, tokens=tokens, num_tokens=V3_TOKENS)


def test_v3_corner_values() -> None:
    assert v3_lr(0) == 2.2e-4
    assert v3_lr(10 * T) == pytest.approx(2.2e-4, rel=1e-12)  # the last token of the plateau
    assert v3_lr(14_300_000_000_000) == pytest.approx(2.2e-5, rel=1e-12)
    assert v3_lr(14_633_000_000_000 - 1) == pytest.approx(2.2e-5, rel=1e-12)
    assert v3_lr(14_633_000_000_000) == 7.3e-6
    assert v3_lr(V3_TOKENS - 1) == 7.3e-6
    assert v3_lr(V3_TOKENS) == 7.3e-6


def test_v3_cosine_between_its_corners() -> None:
    assert v3_lr(12_150_000_000_000) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-12)
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert v3_lr(11_075_000_000_000) == pytest.approx(quarter, rel=1e-12)


def test_v3_warmup_is_linear_in_steps() -> None:
    assert v3_lr(0, step=1) == pytest.approx(2.2e-4 / 2000, rel=1e-12)
    assert v3_lr(10**10, step=1000) == pytest.approx(1.1e-4, rel=1e-12)
    assert v3_lr(10**10, step=2000) == 2.2e-4
    assert v3_lr(10**10, step=2001) == 2.2e-4


def test_v3_bias_speed_and_mtp_weight() -> None:
    speed = StepsConfig(values=[0.001, 0.0], boundaries=[14_300_000_000_000])
    assert [steps_value(speed, t) for t in (0, 14_300_000_000_000 - 1, 14_300_000_000_000, V3_TOKENS)] == [
        0.001,
        0.001,
        0.0,
        0.0,
    ]
    weight = StepsConfig(values=[0.3, 0.1], boundaries=[10 * T])
    assert (steps_value(weight, 10 * T - 1), steps_value(weight, 10 * T)) == (0.3, 0.1)
    assert steps_value(StepsConfig(values=[0.5]), 10**15) == 0.5


def test_constant_and_empty_schedules() -> None:
    for pieces in ([LrPiece()], []):
        config = LrConfig(peak=7.3e-6, pieces=pieces)
        assert {lr_at(config, step=s, tokens=s * 100, num_tokens=1000) for s in range(1, 12)} == {7.3e-6}


def test_linear_warmup_and_cosine() -> None:
    config = LrConfig(peak=1.0, warmup_steps=10, pieces=[LrPiece(curve=Curve.cosine, to=0.1)])
    for step in range(1, 101):
        tokens = (step - 1) * 10
        expected = min(1, step / 10) * (0.1 + 0.9 * (1 + math.cos(math.pi * tokens / 1000)) / 2)
        assert lr_at(config, step=step, tokens=tokens, num_tokens=1000) == pytest.approx(expected, rel=1e-12)
    assert lr_at(config, step=101, tokens=1000, num_tokens=1000) == 0.1


def test_warmup_stable_decay() -> None:
    config = LrConfig(
        peak=3e-4,
        warmup_steps=4,
        pieces=[LrPiece(until_fraction=0.8), LrPiece(curve=Curve.linear, to=0.0)],
    )
    assert piece_ends(config, num_tokens=1000) == [800, 1000]
    assert piece_ends(LrConfig(peak=1.0, pieces=[LrPiece(until_fraction=0.29)]), num_tokens=100) == [29]
    rates = [lr_at(config, step=100, tokens=t, num_tokens=1000) for t in (0, 799, 800, 900, 950, 1000)]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-4, 1.5e-4, 0.75e-4, 0.0], rel=1e-12)


positive_rates = st.floats(1e-8, 1.0)


@st.composite
def lr_configs(draw: st.DrawFn, curves: list[Curve], decreasing: bool) -> tuple[LrConfig, int]:
    num_tokens = draw(st.integers(100, 10**13))
    ends = sorted(draw(st.lists(st.integers(1, num_tokens), min_size=1, max_size=4)))
    rates = draw(st.lists(positive_rates, min_size=len(ends) + 1, max_size=len(ends) + 1))
    if decreasing:
        rates.sort(reverse=True)
    pieces = [
        LrPiece(curve=draw(st.sampled_from(curves)), to=rate, until_tokens=end)
        for end, rate in zip(ends, rates[1:], strict=True)
    ]
    return LrConfig(peak=rates[0], warmup_steps=draw(st.integers(0, 50)), pieces=pieces), num_tokens


@given(lr_configs([*Curve], decreasing=False), st.integers(1, 100), st.floats(0, 1.2))
def test_rates_stay_within_the_rates_named(drawn: tuple[LrConfig, int], step: int, fraction: float) -> None:
    config, num_tokens = drawn
    rate = lr_at(config, step=step, tokens=int(fraction * num_tokens), num_tokens=num_tokens)
    named = [config.peak] + [piece.to for piece in config.pieces if piece.to is not None]
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    assert warmup * min(named) * (1 - 1e-12) <= rate <= warmup * max(named) * (1 + 1e-12)


@given(lr_configs([*Curve], decreasing=True), st.lists(st.floats(0, 1.2), min_size=2, max_size=10))
def test_falling_pieces_never_rise(drawn: tuple[LrConfig, int], fractions: list[float]) -> None:
    config, num_tokens = drawn
    rates = [
        lr_at(config, step=1000, tokens=int(f * num_tokens), num_tokens=num_tokens) for f in sorted(fractions)
    ]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rates))


@given(lr_configs([Curve.linear, Curve.cosine], decreasing=False))
def test_sloped_pieces_join_without_a_jump(drawn: tuple[LrConfig, int]) -> None:
    config, num_tokens = drawn
    last_piece_of = {piece.until_tokens: piece for piece in config.pieces}
    for end, piece in last_piece_of.items():
        assert end is not None
        assert piece.to is not None
        rate = lr_at(config, step=1000, tokens=end, num_tokens=num_tokens)
        assert rate == pytest.approx(piece.to, rel=1e-9)


@given(st.integers(1, 1000), st.integers(1, 200))
def test_warmup_rises_by_equal_amounts(warmup_steps: int, step: int) -> None:
    config = LrConfig(peak=2.2e-4, warmup_steps=warmup_steps)
    rate = lr_at(config, step=step, tokens=step, num_tokens=10**6)
    assert rate == pytest.approx(2.2e-4 * min(1.0, step / warmup_steps), rel=1e-12)


def test_v3_batch_ramp() -> None:
    assert batch_size_at(V3_BATCH, 0) == 3072
    assert batch_size_at(V3_BATCH, 234_500_000_000) == (3072 + 15360) // 2
    assert batch_size_at(V3_BATCH, 469_000_000_000 - 1) == 15360 - 64
    assert batch_size_at(V3_BATCH, 469_000_000_000) == 15360
    assert batch_size_at(V3_BATCH, V3_TOKENS) == 15360


def test_without_a_ramp_the_batch_is_the_final_one_from_the_first_token() -> None:
    assert [batch_size_at(BatchConfig(start=8, end=8), tokens) for tokens in (0, 1, 10**12)] == [8, 8, 8]


@st.composite
def batch_configs(draw: st.DrawFn) -> BatchConfig:
    multiple = draw(st.integers(1, 64))
    start = multiple * draw(st.integers(1, 50))
    end = start + multiple * draw(st.integers(0, 50))
    return BatchConfig(start=start, end=end, ramp_tokens=draw(st.integers(1, 10**6)), multiple_of=multiple)


@given(batch_configs(), st.lists(st.integers(0, 2 * 10**6), min_size=2, max_size=20))
def test_batch_ramp_is_monotone_bounded_and_divisible(config: BatchConfig, tokens: list[int]) -> None:
    sizes = [batch_size_at(config, t) for t in sorted(tokens)]
    assert sizes == sorted(sizes)
    assert all(config.start <= size <= config.end and size % config.multiple_of == 0 for size in sizes)


def walk(stage: StageConfig) -> int:
    steps, tokens = 0, 0
    while tokens < stage.num_tokens:
        tokens += batch_size_at(stage.batch, tokens) * stage.seq_len
        steps += 1
    return steps


@settings(deadline=None)
@given(batch_configs(), st.integers(1, 3 * 10**6), st.integers(16, 512))
def test_num_steps_equals_a_walk(batch: BatchConfig, num_tokens: int, seq_len: int) -> None:
    stage = StageConfig(seq_len=seq_len, num_tokens=num_tokens, batch=batch)
    assert num_steps(stage) == walk(stage)


def test_num_steps_counts_the_step_that_reaches_the_budget() -> None:
    batch = BatchConfig(start=10, end=10)
    for num_tokens, steps in ((1, 1), (999, 1), (1000, 1), (1001, 2), (2000, 2)):
        assert num_steps(StageConfig(seq_len=100, num_tokens=num_tokens, batch=batch)) == steps


def test_num_steps_of_v3() -> None:
    stage = StageConfig(seq_len=4096, num_tokens=V3_TOKENS, batch=V3_BATCH)
    assert num_steps(stage) == walk(stage)
    # On the ramp the batch b obeys db/dn = b * 4096 * slope, hence 469B / (12288 * 4096) * ln(5) steps; the
    # rounding down to 64 sequences adds a little.
    slope = 469e9 / (12288 * 4096)
    ideal = slope * math.log(5) + (V3_TOKENS - 469e9) / (15360 * 4096)
    assert num_steps(stage) == pytest.approx(ideal, rel=2e-3)


def test_context_extension_stages_take_1000_steps() -> None:
    for seq_len, sequences in ((32768, 1920), (131072, 480)):
        batch = BatchConfig(start=sequences, end=sequences)
        stage = StageConfig(seq_len=seq_len, num_tokens=1000 * seq_len * sequences, batch=batch)
        assert num_steps(stage) == 1000


def test_imports_without_torch() -> None:
    code = "import sys, train.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
