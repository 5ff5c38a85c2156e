"""The staged job on several processes, as people start it: torchrun, signals, other layouts, lost ranks.

The corpus, the model and the schedules are those of tests/train/tiny_job.py. FP32: what differs from one
process is the order of summation, which training amplifies step by step.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny_job import ROOT, metrics, overrides

SHAPE = [
    "stages.pretrain_4k.batch={start: 4, end: 8, ramp_tokens: 200, multiple_of: 4}",
    "stages.extend_32k.batch={start: 4, end: 4}",
    "stages.extend_128k.batch={start: 4, end: 4}",
    "stages.extend_32k.num_tokens=1280",
    "stages.extend_128k.num_tokens=1280",
    "parallel.microbatch_size=1",
    "stages.pretrain_4k.parallel.microbatch_size=1",
]
"""Batches that four processes can share."""


def start(root: Path, processes: int, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start the job on so many processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += [f"--max-restarts={restarts}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "train", *overrides(root, *SHAPE, *more)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str]) -> str:
    """Wait for a job and return what it printed."""
    try:
        output, _ = job.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return output


def run(root: Path, processes: int, *more: str) -> str:
    """Run the job to its end."""
    job = start(root, processes, *more)
    output = finish(job)
    assert job.returncode == 0, output
    return output


def wait_for_steps(root: Path, steps: int) -> None:
    """Return when the job has recorded so many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (root / "tiny" / "metrics.jsonl").exists() and len(metrics(root / "tiny")) >= steps:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no {steps} steps in 120 s")


def signal_rank(root: Path, rank: int, number: signal.Signals) -> None:
    """Send a signal to one rank of the job under `root`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"root={root}".encode() in words and f"RANK={rank}".encode() in variables:
            os.kill(int(folder.name), number)
            return
    raise ProcessLookupError(f"rank {rank} of {root}")


def assert_same_curve(run_dir: Path, reference: list[dict[str, Any]]) -> None:
    """The loss curve of one process within 1e-4, on the same samples, with the same loads of every expert."""
    records = metrics(run_dir)
    assert [record["step"] for record in records] == [record["step"] for record in reference]
    for mine, theirs in zip(records, reference, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-4)
        assert mine["max_vio"] == theirs["max_vio"]
        assert mine["bias_range"] == theirs["bias_range"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of one process."""
    root = tmp_path_factory.mktemp("one")
    run(root, 1)
    return metrics(root / "tiny")


def test_one_job_continues_on_other_processes_in_other_layouts(
    tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    """Four processes, then two, then one; stopped by SIGTERM in between, wherever they stand then."""
    four = start(tmp_path, 4, "parallel=pp2_ep2")
    wait_for_steps(tmp_path, 5)
    os.killpg(four.pid, signal.SIGTERM)
    output = finish(four)
    assert "is saved; the same command continues from it" in output, output
    assert output.count("the same command continues from it") == 1
    two = start(tmp_path, 2, "parallel.tp=2")
    wait_for_steps(tmp_path, 10)
    os.killpg(two.pid, signal.SIGTERM)
    assert "is saved; the same command continues from it" in finish(two)
    assert len(metrics(tmp_path / "tiny")) < len(reference)
    run(tmp_path, 1)
    assert_same_curve(tmp_path / "tiny", reference)


def test_a_stage_may_have_a_layout_of_its_own(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    layouts = ["parallel=pp2_ep2", "stages.extend_32k.parallel.pp=1", "stages.extend_32k.parallel.tp=2"]
    layouts += ["stages.extend_128k.parallel.cp=2", "stages.extend_128k.parallel.schedule=zbv"]
    run(tmp_path, 4, *layouts)
    assert_same_curve(tmp_path / "tiny", reference)


def test_a_killed_rank_is_named_and_the_restarted_job_repeats_the_loss(
    tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    job = start(tmp_path, 4, "parallel=pp2_ep2", restarts=1)
    wait_for_steps(tmp_path, 6)
    signal_rank(tmp_path, 2, signal.SIGKILL)
    output = finish(job)
    assert job.returncode == 0, output
    assert "error: rank 2 was killed" in output
    assert_same_curve(tmp_path / "tiny", reference)


def test_a_stopped_rank_is_named_and_the_restarted_job_repeats_the_loss(
    tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    job = start(tmp_path, 4, "parallel=pp2_ep2", "parallel.timeout_s=4", restarts=1)
    wait_for_steps(tmp_path, 6)
    signal_rank(tmp_path, 3, signal.SIGSTOP)
    output = finish(job)
    assert job.returncode == 0, output
    assert "error: rank 3 has not been heard of for 4" in output
    assert "waiting in" in output
    assert_same_curve(tmp_path / "tiny", reference)


def test_a_layout_that_does_not_fit_is_refused_once(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "parallel=pp2_ep2", "parallel.tp=3")
    output = finish(job)
    assert job.returncode != 0
    assert output.count("in the configuration:") == 1
    assert f'File "{ROOT}/train' not in output  # torchrun adds a traceback, of itself
    assert not (tmp_path / "tiny").exists()
