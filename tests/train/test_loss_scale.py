"""Dynamic loss scaling against torch.amp.GradScaler's rule and at its limits."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import LossScaleConfig
from train.loss_scale import LossScale


def small() -> LossScaleConfig:
    return LossScaleConfig(
        initial=64.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=3, minimum=1.0
    )


def after(scale: LossScale, steps: str) -> float:
    """`steps` is a string of f (finite) and o (overflow)."""
    for step in steps:
        scale.update(step == "f")
    return scale.value


@pytest.mark.parametrize(
    ("steps", "value"),
    [
        ("", 64.0),
        ("ff", 64.0),
        ("fff", 128.0),
        ("ffffff", 256.0),
        ("o", 32.0),
        ("ffoff", 32.0),  # an overflow starts the count again
        ("ffofff", 64.0),
        ("oooooo", 1.0),
        ("o" * 50, 1.0),  # never below the minimum
    ],
)
def test_growth_and_backoff(steps: str, value: float) -> None:
    assert after(LossScale(small()), steps) == value


def test_no_configuration_means_one_for_ever() -> None:
    scale = LossScale(None)
    assert after(scale, "ffooff" * 1000) == 1.0
    assert scale.state_dict() == {}
    scale.load_state_dict({})
    assert scale.value == 1.0


def test_growth_stops_before_infinity() -> None:
    config = LossScaleConfig(initial=1e300, growth_factor=1e10, growth_interval=1)
    assert after(LossScale(config), "f" * 10) == 1e300


@given(st.text("fo", max_size=40), st.text("fo", max_size=40))
def test_restored_state_continues_the_same(before: str, later: str) -> None:
    scale, resumed = LossScale(small()), LossScale(small())
    after(scale, before)
    resumed.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert after(resumed, later) == after(scale, later)
    assert resumed.state_dict() == scale.state_dict()


def test_scaling_switched_on_after_a_run_without_it_starts_at_its_initial_value() -> None:
    scale = LossScale(small())
    scale.load_state_dict(LossScale(None).state_dict())
    assert scale.value == 64.0
