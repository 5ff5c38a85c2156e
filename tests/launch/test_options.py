"""Command lines of `python -m launch`: numbers that make no sense are refused by name, before any work."""

from importlib import import_module

import pytest

from launch.__main__ import COMMANDS
from train.errors import EXIT_BAD_INPUT

REFUSED = [
    ("plan", "--imbalance=0.5", "0.5 must be at least 1"),
    ("plan", "--imbalance=nan", "nan must be at least 1"),
    ("plan", "--layouts=0", "0 must be at least 1"),
    ("plan", "--world-size=-8", "-8 must be at least 1"),
    ("dryrun", "--imbalance=inf", "inf must be at least 1, and finite"),
    ("dryrun", "--microbatches=0", "0 must be at least 1"),
    ("dryrun", "--workers=two", "invalid int value: 'two'"),
    ("dryrun", "--rank=first", "first is neither a rank nor all"),
]


@pytest.mark.parametrize(("command", "option", "complaint"), REFUSED)
def test_numbers_are_refused_by_name(
    command: str, option: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"launch.{command}.command").main(["recipe=smoke", option])
    assert stop.value.code == EXIT_BAD_INPUT
    assert f"argument {option.partition('=')[0]}: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"launch.{command}.command").main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m launch {command}" in shown
    assert "key=value" in shown
