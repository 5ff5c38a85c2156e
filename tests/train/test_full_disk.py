"""A full or read-only disk: one message with the path, exit code 2, and the same command continues."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from tests.golden.compose import compose_run
from tests.train.fake_run import FakeStage, write_fake_run
from tests.train.small_disk import fill, read_only, small_disk
from tests.train.tiny_job import command, job_of, metrics, overrides, start, train
from train.checkpoints.durable import replace_durably
from train.errors import EXIT_BAD_INPUT, RunError
from train.evaluation.stages import evaluate_stage, forget_later
from train.logs.sinks import JsonlSink
from train.logs.wandb_sink import run_id
from train.report import write_report
from train.signals import StopRequest

SHORT = [
    "~stages.extend_32k",
    "~stages.extend_128k",
    "checkpoint.every_steps=7",
    "checkpoint.asynchronous=false",
    "evaluation.num_tokens=256",
    "evaluation.needle_trials=1",
    "evaluation.needle_depths=1",
    "evaluation.needle_lengths=1",
]
FULL = "cannot be written: No space left on device; make room, then give the same command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kilobytes=20 << 10) as place:
        yield place


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FillAfter(StopRequest):
    """Asks for nothing; after a number of steps the disk is full."""

    def __init__(self, steps: int, disk: Path) -> None:
        super().__init__()
        self._left = steps
        self._disk = disk

    @property
    def requested(self) -> None:
        self._left -= 1
        if self._left == 0:
            fill(self._disk)


def test_a_disk_that_fills_up_in_the_middle_of_training(disk: Path, tmp_path: Path) -> None:
    """metrics.jsonl is the first to notice; what it could not take is trained again from the checkpoint."""
    run_dir = disk / "tiny"
    with pytest.raises(RunError) as caught:
        job_of(compose_run(*overrides(disk, *SHORT)), run_dir).train(FillAfter(8, disk), Console(quiet=True))
    assert str(caught.value) == f"{run_dir / 'metrics.jsonl'} {FULL}"
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert not (run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
    (disk / "ballast").unlink()
    train(disk, *SHORT)
    assert metrics(run_dir) == metrics(train(tmp_path / "whole", *SHORT))


def test_a_record_is_written_whole_or_refused(disk: Path) -> None:
    """A disk takes the part of a line for which it has room, and calls that a success."""
    path, whole = disk / "metrics.jsonl", []
    sink = JsonlSink(path, resume_step=0)

    def write_on() -> None:
        for step in count(1):
            sink.write({"step": step, "text": "x" * 700})
            whole.append(step)

    fill(disk)
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 10_000)
    with pytest.raises(RunError, match=FULL):
        write_on()
    sink.close()
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines] == whole
    assert torn
    (disk / "ballast").unlink()
    JsonlSink(path, resume_step=1).close()
    assert path.read_text(encoding="utf-8") == f"{lines[0]}\n"


def test_metrics_that_cannot_be_opened(disk: Path) -> None:
    (disk / "run").mkdir()
    with read_only(disk), pytest.raises(RunError) as caught:
        JsonlSink(disk / "run" / "metrics.jsonl", resume_step=0)
    assert str(caught.value) == (
        f"{disk}/run/metrics.jsonl cannot be written: Read-only file system; make it writable, then give the "
        "same command again"
    )


def test_the_configuration_of_a_run_outlives_a_full_disk(disk: Path) -> None:
    run_dir = train(disk, *SHORT)
    before = files(run_dir)
    fill(disk)
    with pytest.raises(RunError, match=f"tiny/config.yaml {FULL}"):
        train(disk, *SHORT, "stages.pretrain_4k.num_tokens=900")
    assert files(run_dir) == before
    (disk / "ballast").unlink()
    train(disk, *SHORT, "stages.pretrain_4k.num_tokens=900")
    assert metrics(run_dir)[-1]["tokens"] >= 900


def test_an_evaluation_that_cannot_be_kept_is_made_again(disk: Path) -> None:
    run_dir = train(disk, *SHORT)
    config = compose_run(*overrides(disk, *SHORT, "evaluation.enabled=true"))
    fill(disk)
    before = files(run_dir)
    with pytest.raises(RunError, match=f"evaluations/pretrain_4k-after.json {FULL}"):
        evaluate_stage(config, run_dir, "pretrain_4k", Console(quiet=True))
    assert files(run_dir) == before
    (disk / "ballast").unlink()
    assert len(evaluate_stage(config, run_dir, "pretrain_4k", Console(quiet=True))) == 1
    with (
        read_only(disk),
        pytest.raises(RunError, match=r"pretrain_4k-after\.json cannot be written: Read-only"),
    ):
        forget_later(run_dir, step=0)


def test_the_name_of_a_run_on_wandb_is_whole_or_absent(disk: Path) -> None:
    (disk / "wandb").mkdir()
    fill(disk)
    with pytest.raises(RunError, match=f"wandb/run_id {FULL}"):
        run_id(disk)
    (disk / "ballast").unlink()
    assert run_id(disk) == run_id(disk) != ""


def test_a_report_that_cannot_be_written_leaves_the_one_before(disk: Path) -> None:
    run_dir = write_fake_run(disk / "run", [FakeStage("pretrain", 128, 32, 25)])
    write_report(run_dir)
    before = files(run_dir)
    fill(disk)
    with pytest.raises(RunError, match=f"run/report.html {FULL}"):
        write_report(run_dir)
    assert files(run_dir) == before
    (disk / "ballast").unlink()
    with read_only(disk), pytest.raises(RunError, match=r"run/report\.html cannot be written: Read-only"):
        write_report(run_dir)
    assert files(run_dir) == before
    write_report(run_dir)
    assert [path.name for path in run_dir.glob("report*")] == ["report.html"]


def test_the_command_ends_with_one_message_and_goes_on_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    train(disk, *SHORT)
    fill(disk)
    process = start(command(disk, *SHORT))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (EXIT_BAD_INPUT, f"error: {disk}/tiny/report.html {FULL}\n")
    (disk / "ballast").unlink()
    process = start(command(disk, *SHORT))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert (disk / "tiny" / "report.html").exists()
    assert "report:" in out


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    replace_durably(path, "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    replace_durably(path, "b")
    assert files(tmp_path) == {path: b"b"}
    shutil.rmtree(tmp_path / "new")
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        replace_durably(path, "c")
    assert list(path.parent.iterdir()) == [path]
