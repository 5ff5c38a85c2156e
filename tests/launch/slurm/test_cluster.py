"""Jobs on a real Slurm of two nodes on this machine, submitted as people do, and what may happen to them.

    bash launch/test_slurm.sh

A job that was disturbed must end with the records of one that was not, bit for bit. Much of a test is
waiting: for Slurm to send a signal, to give a node up, to start a job again. So that script runs three
tests at a time, and each of pytest's workers has a cluster of its own, where nobody disturbs its jobs. A
worker takes two tests that follow each other here; in this order all three end at about the same time.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.slurm.tiny_submit import (
    ended,
    facts,
    script_output,
    shorten_limit,
    slurm,
    submit,
    wait_until,
)
from tests.train.test_many_processes import signal_rank, wait_for_steps
from tests.train.tiny_job import metrics

SCRIPT = Path(__file__).with_name("cluster.sh")
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in NEEDED),
        reason="Slurm is not installed; bash launch/test_slurm.sh installs it",
    ),
]


def control(*words: str) -> None:
    """Run the script that brings the cluster up and down."""
    subprocess.run(["bash", str(SCRIPT), *words], check=True, timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """The folder of a cluster that is up; no other worker uses it."""
    folder = tmp_path_factory.mktemp("cluster")
    number = "0" if worker_id == "master" else worker_id.removeprefix("gw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            control("up", str(folder), "2", number)
            yield folder
        finally:
            control("down", str(folder))


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> list[dict[str, Any]]:
    """The records of a job that nothing happened to: the first worker that needs them makes them for all."""
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    root = shared / "undisturbed"
    with (shared / "undisturbed.lock").open("a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            root.mkdir()
            job = submit(root)
            assert ended(job) == "COMPLETED", script_output(root, job)
            assert facts(job)["Restarts"] == "0"
            lock.write("done")
    return metrics(root / "tiny")


def test_ranks_lie_on_nodes_in_order_and_print_into_their_files(
    cluster: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [record["step"] for record in undisturbed] == list(range(1, 66))
    job = submit(tmp_path, "data.tokenizer=/nowhere", "data.sources.stdlib.path=/nowhere")
    assert ended(job) == "FAILED"
    said = script_output(tmp_path, job)
    assert facts(job)["ExitCode"] == "2:0", said
    assert facts(job)["Restarts"] == "0"
    assert "which another start would repeat" in said
    logs = tmp_path / "tiny" / "slurm" / "logs" / job / "0"
    assert "/nowhere" in (logs / "rank-0.err").read_text(encoding="utf-8")
    assert {path.name for path in logs.glob("*-[01].*")} == {
        "node-0.log",
        "node-1.log",
        "rank-0.err",
        "rank-0.out",
        "rank-1.err",
        "rank-1.out",
    }


def test_a_killed_rank_and_a_signal_before_anyone_listens(
    cluster: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = submit(tmp_path)
    wait_for_steps(tmp_path, 12)
    signal_rank(tmp_path, 1, signal.SIGKILL)
    wait_until(lambda: facts(job)["Restarts"] == "1" and facts(job)["JobState"] == "RUNNING", "second start")
    time.sleep(1)
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert ended(job) == "COMPLETED", script_output(tmp_path, job)
    said = script_output(tmp_path, job)
    assert facts(job)["Restarts"] == "2", said
    assert "lost a process (code 4), 1 of 3 retries; queued again" in said
    assert "stopped with code 75; queued again" in said
    assert metrics(tmp_path / "tiny") == undisturbed


def test_the_time_limit_saves_and_continues_and_scancel_ends_it(cluster: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, "stages.pretrain_4k.num_tokens=10000000", "--time=10", "--signal-before=59")
    assert facts(job)["TimeLimit"] == "00:10:00"
    wait_for_steps(tmp_path, 5)
    shorten_limit(job)
    wait_until(lambda: "stopped with code 75; queued again" in script_output(tmp_path, job), "time limit")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # no second signal, however slow the machine
    saved = len(metrics(tmp_path / "tiny"))
    wait_for_steps(tmp_path, saved + 5)
    slurm("scancel", job)
    wait_until(lambda: "ended by TERM" in script_output(tmp_path, job), "end")
    assert ended(job) == "CANCELLED"
    assert facts(job)["Restarts"] == "1", script_output(tmp_path, job)
    assert script_output(tmp_path, job).count("USR1") == 1
    records = metrics(tmp_path / "tiny")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    newest = max((tmp_path / "tiny" / "checkpoints").iterdir())
    assert newest.name == f"pretrain_4k-{len(records):08d}"  # the ranks saved before they left


def test_a_more_urgent_job_takes_the_nodes_and_gives_them_back(
    cluster: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = submit(tmp_path)
    wait_for_steps(tmp_path, 12)
    urgent = slurm(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        f"--output={tmp_path}/urgent",
        "--wrap=srun hostname",
    ).strip()
    assert ended(urgent) == "COMPLETED"
    assert facts(job)["JobState"] != "COMPLETED"
    assert ended(job) == "COMPLETED", script_output(tmp_path, job)
    said = script_output(tmp_path, job)
    assert facts(job)["Restarts"] == "1", said
    assert "stopped with code 75; queued again" in said
    assert metrics(tmp_path / "tiny") == undisturbed


def test_a_sweep_is_an_array_with_one_run_per_task(cluster: Path, tmp_path: Path) -> None:
    more = ["stages.pretrain_4k.num_tokens=640", "parallel.ep=1", "optimizer.beta1=0.8,0.9"]
    job = submit(tmp_path, *more, "--sweep", nodes=1)
    for task, beta1 in enumerate(("0.8", "0.9")):
        assert ended(f"{job}_{task}") == "COMPLETED"
        run_dir = tmp_path / f"tiny-beta1={beta1}"
        assert f"beta1: {beta1}" in (run_dir / "config.yaml").read_text(encoding="utf-8")
        assert (run_dir / "report.html").exists()
        assert (run_dir / "slurm" / "logs" / f"{job}_{task}" / "0" / "rank-0.out").exists()


def test_a_dead_node_is_left_and_the_job_continues(
    cluster: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = submit(tmp_path)
    wait_for_steps(tmp_path, 12)
    control("cut", str(cluster), "2")
    wait_until(lambda: facts(job)["JobState"] == "PENDING", "the job waits for a node")
    control("restore", str(cluster), "2")
    assert ended(job) == "COMPLETED", script_output(tmp_path, job)
    assert facts(job)["Restarts"] == "1", script_output(tmp_path, job)
    assert metrics(tmp_path / "tiny") == undisturbed
