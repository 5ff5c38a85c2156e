"""Processes find each other, know who they are, and name whoever does not come."""

import os

import pytest
import torch
import torch.distributed as dist

from parallel.errors import ProcessError
from parallel.process import Processes, join, processes_of_environment
from tests.parallel.started import launcher_store, started

CPU = torch.device("cpu")


def variables(rank, world_size, local_rank):
    return {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}


def test_without_a_launcher_a_job_is_one_process():
    assert processes_of_environment({"PATH": "/bin"}) == (0, 1, 0)
    with join({}, device=CPU, timeout_s=1) as processes:
        assert processes == Processes(rank=0, world_size=1, local_rank=0, store=None)
        assert not dist.is_initialized()


def test_a_launcher_says_who_a_process_is():
    assert processes_of_environment(variables("13", "16", "5")) == (13, 16, 5)


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({"RANK": "0"}, r"RANK=0, WORLD_SIZE=\(not set\)"),
        (variables("one", "2", "0"), "RANK=one"),
        (variables("-1", "2", "0"), "RANK=-1"),
        (variables("2", "2", "0"), "RANK < WORLD_SIZE"),
        (variables("0", "0", "0"), "WORLD_SIZE=0"),
        (variables("1", "4", "3"), "LOCAL_RANK <= RANK"),
    ],
)
def test_nonsense_is_refused_with_the_values(environ, shown):
    with pytest.raises(ProcessError, match=shown) as caught:
        processes_of_environment(environ)
    assert "torchrun" in str(caught.value)


def meet_and_part():
    with join(os.environ, device=CPU, timeout_s=30) as processes:
        total = torch.tensor([processes.rank + 1])
        dist.all_reduce(total)
        assert processes.store is not None
        attempts = processes.store.add("attempts", 1)
        print("sum", total.item(), "in the store", attempts <= processes.world_size)
    assert not dist.is_initialized()


@pytest.mark.parametrize("launcher_keeps_store", [True, False])
def test_processes_meet_and_part(tmp_path, launcher_keeps_store):
    with started(tmp_path, 3, meet_and_part, launcher_keeps_store=launcher_keeps_store) as job:
        assert job.exit_codes(ranks=[0, 1, 2], within_s=30) == [0, 0, 0], job.outputs()
        assert [job.printed(rank) for rank in range(3)] == ["sum 6 in the store True\n"] * 3


def test_a_restarted_job_does_not_see_the_keys_of_the_attempt_before(tmp_path):
    store = launcher_store()
    for attempt in "01":
        folder = tmp_path / attempt
        with started(folder, 2, meet_and_part, store=store, TORCHELASTIC_RESTART_COUNT=attempt) as job:
            assert job.exit_codes(ranks=[0, 1], within_s=30) == [0, 0], job.outputs()
            assert "in the store True" in job.printed(0)


def meet_without_rank_2():
    if os.environ["RANK"] == "2":
        return
    with pytest.raises(ProcessError) as caught, join(os.environ, device=CPU, timeout_s=2):
        pass
    print(f"refused: {caught.value}")


def test_whoever_does_not_come_is_named(tmp_path):
    with started(tmp_path, 3, meet_without_rank_2) as job:
        assert job.exit_codes(ranks=[0, 1, 2], within_s=20) == [0, 0, 0], job.outputs()
        assert "rank 0 waited 2 s for the other processes; 1 of 3 did not come: rank 2" in job.printed(0)


def test_a_store_that_nobody_keeps_is_a_message(tmp_path):
    with started(tmp_path, 2, meet_without_rank_2, launcher_keeps_store=False, RANK="1") as job:
        assert job.exit_codes(ranks=[0, 1], within_s=20) == [0, 0], job.outputs()
        assert "refused: rank 1 of 2 cannot reach the others" in job.printed(1)
