"""Submits the tiny job of tests/train/tiny_job.py, as people do, and watches what becomes of it."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.tiny_job import ROOT, overrides

SHAPE = [
    "stages.pretrain_4k.num_tokens=3840",
    "stages.pretrain_4k.batch={start: 4, end: 4}",
    "stages.pretrain_4k.parallel.microbatch_size=1",
    "stages.extend_32k.batch={start: 4, end: 4}",
    "stages.extend_128k.batch={start: 4, end: 4}",
    "parallel.microbatch_size=1",
    "parallel.ep=2",
    "checkpoint.every_steps=10",
]
"""Batches that two processes can share, and first 60 steps: long enough to be disturbed."""

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
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def shorten_limit(job: str) -> None:
    """Set the time limit of a job that runs so that the signal before it is due when Slurm looks next.

    Slurm looks every 30 s whether a signal will be due before it looks again, and limits are whole minutes:
    a job whose `--signal-before` is 59 is left 31 to 90 s.
    """
    hours, minutes, seconds = map(int, facts(job)["RunTime"].split(":"))
    ran = 3600 * hours + 60 * minutes + seconds
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={(ran + 30) // 60 + 1}")


def wait_until(true: Callable[[], bool], what: str, *, seconds: float = 180) -> None:
    """Return as soon as `true` is; TimeoutError after so long."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


def ended(job: str) -> str:
    """Return the state of a job when it has ended."""
    wait_until(lambda: facts(job)["JobState"] not in LIVING, f"job {job} ends", seconds=300)
    return facts(job)["JobState"]


def script_output(root: Path, job: str) -> str:
    """Return what the job's script has said on the first node."""
    path = root / "tiny" / "slurm" / f"job-{job}.out"
    return path.read_text(encoding="utf-8") if path.exists() else ""
