"""The command that prints bubbles beside their formulas."""

import sys

import pytest

from parallel.config import Schedule
from parallel.pipeline.__main__ import main


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["parallel.pipeline", *arguments])
    main()
    return capsys.readouterr().out.splitlines()


def test_every_schedule_has_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, "--pp", "4", "--microbatches", "16")
    by_schedule = {line.split()[0]: line.split() for line in lines[1:] if line}
    assert by_schedule.keys() == {str(schedule) for schedule in Schedule}
    assert by_schedule["1f1b"][3:] == ["0.158", "9.00", "9.00"]
    assert by_schedule["zbv"][3] == "0.030"


def test_each_time_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        printed(monkeypatch, capsys, "--help")
    assert "of of" not in " ".join(capsys.readouterr().out.split())


def test_a_schedule_that_cannot_run_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, "--pp", "4", "--microbatches", "9")
    (reason,) = [line for line in lines if line.startswith("interleaved:")]
    assert "the nearest number is 8" in reason
