"""One mistake, one message, one documented exit code: also when many processes make it."""

import os
import signal
import time
from functools import partial

import pytest
import torch

import train.errors as errors
from data.errors import DataError
from model.errors import WeightsError
from parallel.errors import EXIT_LOST, LostRankError, ProcessError
from parallel.process import join
from tests.parallel.started import started
from train.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RunError, exit_cleanly


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (RunError("top_k=9"), EXIT_BAD_INPUT, "error: top_k=9\n"),
        (RunError("saved", exit_code=EXIT_STOPPED), EXIT_STOPPED, "saved\n"),
        (DataError("no shards"), EXIT_BAD_INPUT, "error: no shards\n"),
        (WeightsError("misshaped"), EXIT_BAD_INPUT, "error: misshaped\n"),
        (ProcessError("RANK=one"), EXIT_BAD_INPUT, "error: RANK=one\n"),
        (LostRankError("rank 3"), EXIT_LOST, ""),  # the watchdog has printed it
    ],
)
def test_each_error_has_its_message_and_code(error, code, printed, capsys):
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == printed


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), exit_cleanly():
        raise KeyError("a bug")


def fail_together(mistaken):
    with (
        join(os.environ, device=torch.device("cpu"), timeout_s=30) as processes,
        exit_cleanly(processes),
    ):
        if processes.rank in mistaken:
            raise RunError("the corpus has 7 tokens")
        time.sleep(60)


def test_a_mistake_of_all_processes_is_printed_by_rank_0_alone(tmp_path):
    with started(tmp_path, 3, partial(fail_together, (0, 1, 2))) as job:
        assert job.exit_codes(ranks=[0, 1, 2], within_s=30) == [EXIT_BAD_INPUT] * 3
        assert job.outputs() == {0: "error: the corpus has 7 tokens\n", 1: "", 2: ""}


def test_a_mistake_of_some_processes_is_printed_once_with_a_rank(tmp_path):
    with started(tmp_path, 3, partial(fail_together, (1, 2))) as job:
        assert job.exit_codes(ranks=[1, 2], within_s=30) == [EXIT_BAD_INPUT] * 2
        (message,) = job.messages()
    assert message in [f"rank {rank}: error: the corpus has 7 tokens" for rank in (1, 2)]


def fail_before_meeting(mistaken, head_start_s):
    errors.UNMET_HEAD_START_S = head_start_s
    with exit_cleanly():
        if os.environ["RANK"] in mistaken:
            raise RunError("top_k=9")
        time.sleep(60)


def test_before_they_have_met_the_launcher_ends_the_others_first(tmp_path):
    with started(tmp_path, 3, partial(fail_before_meeting, "012", 30)) as job:
        assert job.exit_codes(ranks=[0], within_s=30) == [EXIT_BAD_INPUT]
        for rank in (1, 2):  # as torchrun does
            job.send(rank, signal.SIGTERM)
        job.exit_codes(ranks=[1, 2], within_s=10)
        assert job.outputs() == {0: "error: top_k=9\n", 1: "", 2: ""}


def test_before_they_have_met_a_mistake_of_one_process_is_not_lost(tmp_path):
    with started(tmp_path, 2, partial(fail_before_meeting, "1", 0.2)) as job:
        assert job.exit_codes(ranks=[1], within_s=30) == [EXIT_BAD_INPUT]
        assert job.printed(1) == "rank 1: error: top_k=9\n"
