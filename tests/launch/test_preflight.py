"""`python -m launch preflight` on real processes: a healthy job passes, every sabotage is named."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.preflight.command import main
from launch.preflight.folder import check_folder
from launch.preflight.site import Outcome
from parallel.errors import EXIT_LOST
from tests.distributed import run_ranks
from tests.launch.preflight_job import everything_wrong, outcomes_of, site_of
from tests.parallel.started import started
from train.errors import EXIT_BAD_INPUT, exit_cleanly

HEALTHY = ["recipe=smoke", "parallel=pp2_ep2", "--slow-percent", "1e6", "--message-mb", "0.01"]


def command(root: Path, *more: str, sabotage: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Return what a process of the job runs."""

    def run() -> None:
        sabotage()
        with exit_cleanly():
            main([*HEALTHY, f"root={root}", *more])

    return run


def test_a_healthy_job_of_four_processes_passes(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with started(tmp_path / "out", 4, command(root, "--json")) as job:
        assert job.exit_codes(ranks=[0, 1, 2, 3], within_s=100) == [0, 0, 0, 0]
        answer = json.loads(job.printed(0))
        assert [job.printed(rank) for rank in (1, 2, 3)] == ["", "", ""]
    assert answer["healthy"]
    assert [check["status"] for check in answer["checks"]] == [
        *("ok", "ok", "skipped", "ok", "skipped", "ok", "ok")
    ]
    tried = {(group["axis"], group["operation"], tuple(group["ranks"])) for group in answer["groups"]}
    assert {("ep", "all_to_all", (0, 1)), ("ep", "all_to_all", (2, 3)), ("pp", "relay", (1, 3))} <= tried
    assert all(group["busbw"] > 0 and group["wrong"] == 0 for group in answer["groups"])
    assert not root.exists()  # nothing stays behind


def test_every_problem_is_named_with_its_rank_and_none_hides_another(tmp_path: Path) -> None:
    reports = run_ranks(4, everything_wrong, tmp_path)
    assert all(report == reports[0] for report in reports)
    problems = {name: outcome.problems for name, outcome in reports[0].items()}
    assert any("parallel.microbatch_size=7" in line for line in problems["layout"])
    (version,) = problems["software"]
    assert version.startswith("triton is 0.0.1 on rank 1 (node1), but 3.")
    assert "--exclude=node1" in version
    (clock,) = problems["clocks"]
    assert clock.startswith("the clock of node3 is ")
    assert 59 < float(clock.split()[5]) < 61
    assert "ahead" in clock
    (folder,) = problems["checkpoint folder"]
    assert folder.startswith("rank 2 (node2): ")
    assert "does not show what rank 0 wrote there (No such file or directory)" in folder
    # on a busy machine another rank may be slow too
    assert any(line.startswith("rank 1 (node1): a matrix product takes ") for line in problems["products"])
    wrong = [line for line in problems["groups"] if "wrong values" in line]
    assert any(line.startswith("all_to_all over ep of rank 2 (node2), rank 3 (node3)") for line in wrong)
    assert all("from rank 3 (node3)" in line and "--exclude=node3" in line for line in wrong)
    assert reports[0]["devices"].skipped


def test_configurations_that_differ_are_named_and_no_layout_is_tried(tmp_path: Path) -> None:
    def run() -> None:
        rank = int(os.environ["RANK"])
        command(tmp_path / "runs", f"parallel.tp={1 + rank // 2}")()

    with started(tmp_path / "out", 3, run) as job:
        assert job.exit_codes(ranks=[0, 1, 2], within_s=100) == [EXIT_BAD_INPUT] * 3
        printed = job.outputs()
    assert "configuration is" in printed[0]
    assert "on rank 2 (" in printed[0]
    assert "error: preflight found" in printed[0]
    assert "all_to_all" in printed[0]
    assert (printed[1], printed[2]) == ("", "")


def test_a_rank_that_hangs_is_named_with_the_check(tmp_path: Path) -> None:
    """Rank 2 waits for a git that does not answer."""
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin" / "git"
    git.write_text("#!/bin/sh\nexec sleep 30\n")
    git.chmod(0o755)

    def hang() -> None:
        if os.environ["RANK"] == "2":
            os.environ["PATH"] = f"{git.parent}:{os.environ['PATH']}"

    with started(tmp_path / "out", 4, command(tmp_path / "runs", "--timeout-s", "6", sabotage=hang)) as job:
        assert job.exit_codes(ranks=[0, 1, 3], within_s=100) == [EXIT_LOST] * 3
        (message,) = job.messages()
    assert "it waits for rank 2, at step 2, computing" in message


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that other users may enter; those of tmp_path they may not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def unprivileged(rank: int, folder: Path) -> Outcome:
    site = site_of(rank, 2, ["recipe=smoke", f"root={folder}"])
    if rank == 1:
        os.seteuid(65534)  # as where a file server does not know the user
    return check_folder(site)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_rank_that_may_not_write_is_named(readable: Path) -> None:
    outcome, same = run_ranks(2, unprivileged, readable)
    assert outcome == same
    (problem,) = outcome.problems
    assert problem.startswith("rank 1 (")
    assert "cannot be written to (Permission denied)" in problem
    assert list(readable.rglob("*")) == []


def test_a_folder_that_cannot_be_made_is_one_problem_among_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = outcomes_of(site_of(0, 1, ["recipe=smoke", f"root={tmp_path}/file"]))
    (problem,) = found["checkpoint folder"].problems
    assert "Not a directory" in problem
    assert "use another root=" in problem
    assert [outcome.status for outcome in found.values()].count("failed") == 1


def test_a_backend_that_this_machine_cannot_run_is_a_problem_of_the_layout(tmp_path: Path) -> None:
    more = ["precision=fp8_triton", "optimizer.kernel=transformer_engine", "device=cpu"]
    found = outcomes_of(site_of(0, 1, ["recipe=smoke", f"root={tmp_path}/runs", *more]))
    asked = [line.split(" needs ")[0] for line in found["layout"].problems]
    assert set(asked) == {"precision.gemm=fp8_triton", "optimizer.kernel=transformer_engine"}
    assert all("; use " in line for line in found["layout"].problems)
