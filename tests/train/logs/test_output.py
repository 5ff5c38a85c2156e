"""Output that nobody takes: training outlives it, every other command ends with a documented code."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from tests.train.tiny_job import ROOT, command, metrics, start
from tests.train.tiny_run import make_run
from train.errors import EXIT_BAD_INPUT, EXIT_CLOSED_PIPE, RunError, exit_cleanly
from train.logs.output import outlive_readers

NOTE = "note: stdout cannot be written: {}; the run goes on, metrics.jsonl has every step\n"


def without_reader(*, buffered: bool) -> TextIO:
    """Return a stream into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    if buffered:
        return open(writer, "w")
    return io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)  # type: ignore[type-var]  # as `python -u`


@pytest.fixture(params=[True, False], ids=["buffered", "unbuffered"])
def unread(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    stream = without_reader(buffered=request.param)
    yield stream
    with suppress(OSError):
        stream.close()


def full() -> TextIO:
    return open("/dev/full", "w")


def by_print() -> None:
    print("text")


def by_print_at_once() -> None:
    print("text", flush=True)


def by_rich() -> None:
    Console().print("text")


WAYS = [by_print, by_print_at_once, by_rich]


@pytest.mark.parametrize("say", WAYS)
def test_a_command_ends_quietly_when_its_reader_has_left(unread, say, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        say()
    assert stop.value.code == EXIT_CLOSED_PIPE
    assert capsys.readouterr().err == ""
    unread.flush()  # as Python does at its end


@pytest.mark.parametrize("say", WAYS)
def test_a_command_says_that_its_output_found_no_room(say, monkeypatch, capsys) -> None:
    with full() as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stop, exit_cleanly():
            say()
    assert stop.value.code == EXIT_BAD_INPUT
    reason = "error: stdout cannot be written: No space left on device"
    assert capsys.readouterr().err == f"{reason}; make room, then give the same command again\n"


def test_a_mistake_keeps_its_code_when_nobody_reads_it(unread, monkeypatch) -> None:
    with suppress(OSError):
        unread.write("text")
    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "stderr", unread)
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        raise RunError("top_k=9")
    assert stop.value.code == EXIT_BAD_INPUT
    unread.flush()


def test_another_pipe_that_breaks_is_no_reader_that_left() -> None:
    with pytest.raises(BrokenPipeError), exit_cleanly():
        raise BrokenPipeError


def test_a_closed_stdout_is_no_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with exit_cleanly(), outlive_readers():
        print("text")
        Console().print("text")


@pytest.mark.parametrize("say", WAYS)
def test_a_run_outlives_its_reader_and_says_so_once(unread, say, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    with exit_cleanly(), outlive_readers(), exit_cleanly():
        for _ in range(3):
            say()
    assert capsys.readouterr().err == NOTE.format("Broken pipe")
    assert sys.stdout is unread


def test_a_run_outlives_the_readers_of_both_streams(unread, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", unread)
    monkeypatch.setattr(sys, "stderr", without_reader(buffered=True))
    with exit_cleanly(), outlive_readers():
        by_rich()
        print("text", file=sys.stderr)
    sys.stderr.close()


def test_training_goes_on_when_its_reader_has_left(tmp_path: Path) -> None:
    short = ["~stages.extend_32k", "~stages.extend_128k", "logging.console_every=1"]
    process = start(command(tmp_path, *short))
    assert process.stdout is not None
    assert process.stderr is not None
    assert "stage pretrain_4k" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == NOTE.format("Broken pipe")
    assert process.wait(timeout=120) == 0
    assert metrics(tmp_path / "tiny")[-1]["stage_tokens"] >= 640
    assert (tmp_path / "tiny" / "report.html").exists()


@pytest.mark.parametrize(
    "arguments", [["train.generate", "--prompt", "alpha", "--max-new-tokens", "3"], ["train.evaluate"]]
)
def test_a_command_whose_reader_left_has_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    module, *options = arguments
    line = [sys.executable, "-m", module, str(make_run(tmp_path)), *options]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, "")
