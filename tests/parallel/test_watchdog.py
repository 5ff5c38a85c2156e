"""A rank that dies or hangs ends the job soon; one message has its rank, its step, and who waits in what."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.errors import EXIT_LOST, LostRankError
from parallel.groups import Trace
from parallel.process import Processes
from parallel.watchdog import Watchdog
from tests.parallel.started import started
from tests.parallel.watched_job import INTERVAL_S, TIMEOUT_S, main

ROOT = Path(__file__).resolve().parents[2]
SOON_S = TIMEOUT_S + 12 * INTERVAL_S  # the documented bound
SLACK_S = 5  # for a loaded machine
WAITING = r"rank \d is at step \d+, waiting in all_reduce over a for \d\.\d s \(ranks 0, 1(, 2)?\)"


def job(folder, behaviour, culprit, **how):
    return started(folder, 3, partial(main, behaviour, culprit), **how)


def wait_for_step_5(running):
    running.wait_for("step 5", ranks=[0, 1, 2])
    time.sleep(2 * INTERVAL_S)  # and until their heartbeats say so


def the_message(found):
    """Return the one message that all ranks printed together."""
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named(tmp_path, victim):
    others = [rank for rank in range(3) if rank != victim]
    with job(tmp_path, "run", victim) as running:
        wait_for_step_5(running)
        running.send(victim, signal.SIGSTOP)
        assert running.exit_codes(ranks=others, within_s=SOON_S + SLACK_S) == [EXIT_LOST] * 2
        message = the_message(running.messages())
    lost = rf"rank {victim} has not been heard of for 2\.\d s .*last seen at step \d+, .*all_reduce over a"
    assert re.search(f"error: {lost}.*; {WAITING}", message)


def test_a_stopped_rank_that_wakes_leaves_too_and_blames_nobody(tmp_path):
    with job(tmp_path, "run", 1) as running:
        wait_for_step_5(running)
        running.send(1, signal.SIGSTOP)
        running.exit_codes(ranks=[0, 2], within_s=SOON_S + SLACK_S)
        running.send(1, signal.SIGCONT)
        running.exit_codes(ranks=[1], within_s=SOON_S + SLACK_S)
        assert "rank 1 has not been heard of" in the_message(running.messages())


def test_a_short_stop_is_forgiven(tmp_path):
    with job(tmp_path, "run", 1) as running:
        wait_for_step_5(running)
        for rank in (1, 2):
            running.send(rank, signal.SIGSTOP)
            time.sleep(TIMEOUT_S / 2)
            running.send(rank, signal.SIGCONT)
        time.sleep(TIMEOUT_S)
        assert [process.exitcode for process in running.processes] == [None] * 3, running.outputs()


def test_a_rank_that_sleeps_for_ever_is_named(tmp_path):
    with job(tmp_path, "sleep", 1) as running:
        wait_for_step_5(running)
        assert running.exit_codes(ranks=[0, 1, 2], within_s=SOON_S + SLACK_S) == [EXIT_LOST] * 3
        message = the_message(running.messages())
    assert re.search(
        f"{WAITING}, longer than timeout_s=2 allows; it waits for rank 1, at step 5, computing", message
    )


def test_a_rank_in_another_collective_is_named(tmp_path):
    with job(tmp_path, "skip", 1) as running:
        assert running.exit_codes(ranks=[0, 1, 2], within_s=30) == [EXIT_LOST] * 3
        message = the_message(running.messages())
    ways = ("waiting in all_reduce over a", "waiting in all_reduce over b")
    assert all(way in message for way in ways)


def test_a_rank_with_an_error_of_its_own_is_named_beside_its_traceback(tmp_path):
    with job(tmp_path, "bug", 1) as running:
        assert running.exit_codes(ranks=[0, 1, 2], within_s=30) == [EXIT_LOST, 1, EXIT_LOST]
        outputs = running.outputs()
    assert "misbehave" in outputs[1]  # the traceback
    message = the_message(
        [line for rank in (0, 2) for line in outputs[rank].splitlines() if "error:" in line]
    )
    assert re.search(f"rank 1 left at step 5 with RuntimeError: .*; {WAITING}", message)


def test_a_job_that_finishes_is_left_alone(tmp_path):
    with job(tmp_path, "finish", 0) as running:
        assert running.exit_codes(ranks=[0, 1, 2], within_s=30) == [0, 0, 0]
        assert running.messages() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_may_be_lost_with_the_store_that_it_keeps(tmp_path, number):
    with job(tmp_path, "run", 0, launcher_keeps_store=False) as running:
        wait_for_step_5(running)
        running.send(0, number)
        assert running.exit_codes(ranks=[1, 2], within_s=SOON_S + SLACK_S) == [EXIT_LOST] * 2
        message = the_message([line for line in running.messages() if line.startswith("error: ")])
    assert re.search(r"the store of the job .* the launcher or rank 0, is lost; rank 1 is at step", message)


def test_torchrun_kill_9(tmp_path):
    """torchrun sends SIGTERM to the others within 0.1 s: they still say which rank was lost."""
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "tests.parallel.watched_job", "run", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = {
            int(line.split()[0]): int(line.split()[1])
            for line in (process.stdout.readline() for _ in range(2))
        }
        try:
            os.kill(pids[1], signal.SIGKILL)
            _, err = process.communicate(timeout=SOON_S + SLACK_S)
        finally:
            process.kill()
    assert process.returncode == 1  # torchrun's own
    message = the_message([line for line in err.splitlines() if line.startswith("error: ")])
    assert re.search(
        rf"rank 1 was killed or crashed .*last seen at step \d+.*; {WAITING}: RuntimeError", message
    )
    assert "[rank" not in err  # no tracebacks


def two(store):
    return [
        Watchdog(Processes(rank, 2, rank, store), trace=Trace(), timeout_s=60, interval_s=0.05)
        for rank in range(2)
    ]


def test_guard_explains_a_failure_by_whoever_left_and_prints_it(capfd):
    mine, other = two(dist.HashStore())
    with mine:
        other.step = 7
        with pytest.raises(ValueError, match="wrong"), other:
            raise ValueError("wrong")
        explained = pytest.raises(
            LostRankError, match="rank 1 left at step 7 with ValueError: wrong; rank 0 is"
        )
        with explained, mine.guard():
            raise RuntimeError("closed by peer")
    assert capfd.readouterr().err.count("rank 1 left at step 7") == 1


def test_guard_passes_an_error_that_no_other_process_explains(capfd):
    mine, other = two(dist.HashStore())
    with mine, other, pytest.raises(RuntimeError, match="shapes"), mine.guard():
        raise RuntimeError("shapes")
    assert capfd.readouterr().err == ""


def test_one_process_is_not_watched():
    watchdog = Watchdog(Processes(), trace=Trace(), timeout_s=1)
    with pytest.raises(RuntimeError, match="mine"), watchdog, watchdog.guard():
        raise RuntimeError("mine")
