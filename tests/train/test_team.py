"""Who leads a job, and what the others learn of it."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.errors import DataError
from parallel.groups import Group, Trace
from parallel.process import Processes
from parallel.watchdog import Watchdog
from tests.distributed import run_ranks
from train.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RunError
from train.team import Team, alone


def team_of(rank: int, store: dist.Store) -> Team:
    processes, trace = Processes(rank, 2, rank, store), Trace()
    return Team(
        processes=processes,
        device=torch.device("cpu"),
        world=Group("world", range(2), rank=rank, trace=trace),
        trace=trace,
        watchdog=Watchdog(processes, trace=trace, timeout_s=5.0),
    )


def lead_and_follow(rank: int, path: str) -> list[str]:
    """Return what this process saw of four pieces of work, three of which go wrong."""
    team, seen = team_of(rank, dist.FileStore(path, 2)), []

    def work(error: Exception | None) -> None:
        time.sleep(0.3)
        seen.append("worked")
        if error:
            raise error

    errors = (None, RunError("stopped", exit_code=EXIT_STOPPED), DataError("no corpus"), KeyError("a bug"))
    for error in errors:
        try:
            team.lead(lambda error=error: work(error))
            seen.append("went on")
        except RunError as known:
            seen.append(f"{known} {known.exit_code}")
        except (DataError, KeyError) as other:
            seen.append(type(other).__name__)
    assert not team.trace.under_way
    return seen


def test_the_others_wait_for_the_leader_and_share_its_mistakes(tmp_path: Path) -> None:
    leader, follower = run_ranks(2, lead_and_follow, str(tmp_path / "store"))
    assert leader == [
        "worked",
        "went on",
        "worked",
        "stopped 75",
        "worked",
        "DataError",
        "worked",
        "KeyError",
    ]
    assert follower[:3] == ["went on", f"stopped {EXIT_STOPPED}", f"no corpus {EXIT_BAD_INPUT}"]
    assert follower[3] == "the leader failed; see what it printed 1"


def test_one_process_leads_itself() -> None:
    team, done = alone(torch.device("cpu")), []
    team.lead(lambda: done.append(1))
    assert done == [1]
    assert team.leads
    with pytest.raises(DataError):
        team.lead(_no_data)


def _no_data() -> None:
    raise DataError("no corpus")
