"""Submits the tiny job of tests/train/tiny_job.py, as people do, and watches what becomes of it."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.tiny_job import ROOT, overrides

SHAPE = [
    "stages.pretrain_4k.num_tokens=5120",
    "stages.pretrain_4k.batch={start: 4, end: 4}",
    "stages.pretrain_4k.parallel.microbatch_size=1",
    "stages.extend_32k.batch={start: 4, end: 4}",
    "stages.extend_128k.batch={start: 4, end: 4}",
    "parallel.microbatch_size=1",
    "parallel.ep=2",
    "checkpoint.every_steps=20",
]
"""Batches that two processes can share, and first 80 steps: long enough to be disturbed."""


LIVING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SIGNALING")


def submit(root: Path, *more: str, nodes: int = 2) -> str:
    """Submit the job, one process on each node, with further options or overrides; return its number."""
    command = [sys.executable, "-m", "launch", "submit", *overrides(root, *SHAPE), *more]
    command += ["--nodes", str(nodes), "--gpus-per-node", "0", "--processes-per-node", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[2].rstrip(";")


def slurm(*command: str) -> str:
    """Run one of Slurm's commands and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def facts(job: str) -> dict[str, str]:
    """Return what Slurm says of a job, such as JobState and Restarts."""
    words = slurm("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.partition("=")[::2] for word in words)


def wait_until(true: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
    """Return as soon as `true` is; TimeoutError after so long."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


def ended(job: str) -> str:
    """Return the state of a job when it has ended."""
    wait_until(lambda: facts(job)["JobState"] not in LIVING, f"job {job} ends", seconds=180)
    return facts(job)["JobState"]


def script_output(root: Path, job: str) -> str:
    """Return what the job's script has said on the first node."""
    path = root / "tiny" / "slurm" / f"job-{job}.out"
    return path.read_text(encoding="utf-8") if path.exists() else ""
