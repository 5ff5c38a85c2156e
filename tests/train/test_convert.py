"""The command: nothing is overwritten or left half written, and mistakes are named."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.train.hf.runs import refused, tiny, write_run
from train.convert import parse_size
from train.errors import RunError
from train.hf import writer as hf_writer
from train.hf.progress import byte_progress


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious.txt").write_text("x")
    assert "exists already" in refused(capsys, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["precious.txt"]


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", tiny())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_writer, "save_file", full)
    message = refused(capsys, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert "No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("name", "words"), [("nowhere", "does not exist"), ("empty", "no manifest.json")])
def test_sources_that_are_no_run(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert words in refused(capsys, "to-hf", tmp_path / name, tmp_path / "hf")
    assert "config.json" in refused(capsys, "from-hf", tmp_path / name, tmp_path / "hf")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="--shard-size"):
        parse_size(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=terminal, width=100)
    with byte_progress(console, verb="writing", total_bytes=3000) as advance:
        advance("a.safetensors", 1000)
        advance("a.safetensors", 1000)
        advance("b.safetensors", 1000)
    shown = capsys.readouterr().out
    if terminal:
        assert "\x1b" in shown
        assert "3.0/3.0 kB" in shown
    else:
        assert shown.splitlines() == [
            "writing a.safetensors · 2KB of 3KB",
            "writing b.safetensors · 3KB of 3KB",
        ]
