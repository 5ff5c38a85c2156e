"""Which stage comes next, which came before, and what each is mixed from."""

import pytest

from data.config import DataConfig, SourceConfig
from train.config import RunConfig, StageConfig
from train.errors import RunError
from train.stages import previous, remaining, source_weights
from train.state import TrainState

CONFIG = RunConfig(
    data=DataConfig(sources={"web": SourceConfig(path="web", weight=3.0), "code": SourceConfig(path="code")}),
    stages={name: StageConfig(num_tokens=100) for name in ("one", "two", "three")},
)


@pytest.mark.parametrize(
    ("stage", "stage_tokens", "left"),
    [
        ("", 0, ["one", "two", "three"]),
        ("one", 99, ["one", "two", "three"]),
        ("one", 100, ["two", "three"]),
        ("two", 0, ["two", "three"]),
        ("three", 120, []),
    ],
)
def test_a_stage_remains_until_its_budget_is_spent(stage: str, stage_tokens: int, left: list[str]) -> None:
    assert remaining(CONFIG, TrainState(stage=stage, stage_tokens=stage_tokens)) == left


def test_a_stage_that_the_configuration_lacks_is_named() -> None:
    with pytest.raises(RunError, match=r"'zero', which .* \(stages: one, two, three\)"):
        remaining(CONFIG, TrainState(stage="zero"))


def test_the_first_stage_has_none_before_it() -> None:
    assert [previous(CONFIG, stage) for stage in CONFIG.stages] == [None, "one", "two"]


def test_a_stage_may_leave_a_source_out() -> None:
    assert source_weights(CONFIG, StageConfig()) == {"web": 3.0, "code": 1.0}
    assert source_weights(CONFIG, StageConfig(source_weights={"web": 0.0})) == {"web": 0.0, "code": 1.0}
