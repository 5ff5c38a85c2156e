"""`python -m launch local`: a real job of two processes, stopped, killed, restarted, and refused."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.local.command import LocalJob, main
from tests.train.test_many_processes import finish, signal_rank, wait_for_steps
from tests.train.tiny_job import ROOT, metrics, overrides
from train.errors import EXIT_BAD_INPUT, RunError

SHAPE = [
    "stages.pretrain_4k.batch={start: 2, end: 2}",
    "stages.extend_32k.batch={start: 2, end: 2}",
    "stages.extend_128k.batch={start: 2, end: 2}",
    "parallel.microbatch_size=1",
    "stages.pretrain_4k.parallel.microbatch_size=1",
    "parallel.ep=2",
    "stages.pretrain_4k.num_tokens=960",
]


def start(root: Path, *more: str) -> subprocess.Popen[str]:
    """Start the job on two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "local", *overrides(root, *SHAPE), "--nproc", "2", *more],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_saves_and_a_lost_rank_is_restarted(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_for_steps(tmp_path, 5)
    os.killpg(first.pid, signal.SIGINT)
    output = finish(first)
    assert first.returncode == 75, output
    assert "the job saves after its step and stops; Ctrl-C again" in output
    assert "is saved; the same command continues from it" in output
    steps = len(metrics(tmp_path / "tiny"))
    second = start(tmp_path, "--restarts", "1")
    wait_for_steps(tmp_path, steps + 5)
    signal_rank(tmp_path, 1, signal.SIGKILL)
    output = finish(second)
    assert second.returncode == 0, output
    assert "a process was lost (code 4); restart 1 of 1" in output
    assert "rank 1 was killed" in output
    records = metrics(tmp_path / "tiny")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["stage"] == "extend_128k"
    assert sorted(path.name for path in (tmp_path / "tiny" / "logs").iterdir()) == [
        "rank-1.err",
        "rank-1.out",
    ]


def test_a_mistake_is_not_repeated_and_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    nothing = start(tmp_path / "a", "data.tokenizer=/nowhere", "--restarts", "3")
    impatient = start(tmp_path / "b")
    while not (tmp_path / "b" / "tiny" / "logs" / "rank-1.out").exists():  # the processes are there
        assert impatient.poll() is None
    assert impatient.stdout is not None
    os.killpg(impatient.pid, signal.SIGINT)
    while "Ctrl-C again ends it at once" not in impatient.stdout.readline():
        assert impatient.poll() is None
    os.killpg(impatient.pid, signal.SIGINT)
    output = finish(impatient)
    assert impatient.returncode == 128 + signal.SIGHUP, output
    output = finish(nothing)
    assert nothing.returncode == 2, output
    assert output.count("error: ") == 1, output


def test_a_terminal_that_is_closed_ends_the_job_unless_it_was_started_with_nohup(tmp_path: Path) -> None:
    class Sleeping(LocalJob):
        def __init__(self) -> None:
            super().__init__([], num_processes=1, logs=tmp_path)
            self._command = ["sleep", "60"]

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    with Sleeping() as job:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP)).start()
        assert job.run() == 128 + signal.SIGHUP
        assert job.stopping  # and is not started again
    with Sleeping() as job:
        os.kill(os.getpid(), signal.SIGHUP)  # before there is anything to end
        assert job.run() == 128 + signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Sleeping():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("option", ["--nproc=0", "--restarts=-1"])
def test_numbers_that_are_too_small_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recipe=smoke", "--nproc=1", option])
    assert stop.value.code == EXIT_BAD_INPUT
    name, _, value = option.partition("=")
    assert f"argument {name}: {value} must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=smoke", "parallel.pp=2", "--nproc", "3"], "not 3"),
        (["recipe=nothing", "--nproc", "1"], "nothing"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        main([*arguments, f"root={tmp_path}/runs"])
    assert list(tmp_path.iterdir()) == []
