"""`python -m launch submit recipe=NAME key=value … --nodes N`: write a Slurm job script and submit it.

The configuration is checked as `python -m train` would on so many processes, and so is everything that Slurm
is asked for: a mistake ends here, with exit code 2, and not after hours in the queue.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from launch.options import command_parser
from launch.submit.request import Request
from launch.submit.runs import Runs, plan_runs
from launch.submit.script import job_script
from train.errors import RunError


def main(argv: list[str]) -> None:
    """Check, write RUN_DIR/slurm/job.sh and submit it, or print it with --dry. RunError with all problems."""
    asked = _parser().parse_intermixed_args(argv)
    request = _request(asked)
    runs = _checked(asked, request)
    home = runs.folder / "slurm"
    text = job_script(request, runs.tasks, home=home, workdir=Path.cwd(), python=sys.executable)
    if asked.dry:
        print(text, end="")
        return
    path = home / "job.sh"
    _write(path, text)
    print(_submitted(path, home, num_tasks=len(runs.tasks)))


def _checked(asked: argparse.Namespace, request: Request) -> Runs:
    """Return the runs if nothing is wrong with them nor with the request."""
    found = request.problems()
    if request.at_once is not None and not asked.sweep:
        found.append(f"--at-once {request.at_once} needs --sweep; leave it out for a single run")
    runs = None
    try:
        runs = plan_runs(asked.overrides, sweep=asked.sweep, world_size=max(1, request.world_size))
        found += runs.problems
    except RunError as error:
        found.append(str(error))
    if runs is None or found:
        noun = "problem" if len(found) == 1 else "problems"
        lines = "\n".join(f"  {line}" for line in found)
        raise RunError(f"{len(found)} {noun} in the request; nothing was submitted:\n{lines}")
    return runs


def _write(path: Path, text: str) -> None:
    """Replace a script as a whole: bash reads one that runs piece by piece."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}; use another root=") from error


def _submitted(path: Path, home: Path, *, num_tasks: int) -> str:
    """Submit a script; return what happened and what to do next. RunError with sbatch's own refusal."""
    command = ["sbatch", "--parsable", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RunError(
            f"sbatch is not on this machine; submit {path} from a login node of the cluster"
        ) from error
    if done.returncode:
        raise RunError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    tasks = f"; {num_tasks} runs, one per task" if num_tasks > 1 else ""
    return (
        f"submitted job {job}{tasks}\n"
        f"  script   {path}\n"
        f"  watch    squeue -j {job}; tail -F {home}/job-{job}{'_0' if num_tasks > 1 else ''}.out\n"
        f"  save and start again   scancel --batch --signal=USR1 {job}\n"
        f"  end      scancel {job}"
    )


def _request(asked: argparse.Namespace) -> Request:
    return Request(**{each.name: getattr(asked, each.name) for each in fields(Request)})


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("submit", __doc__)
    add = parser.add_argument
    add("--nodes", type=int, required=True, help="machines of the job")
    add("--gpus-per-node", type=int, default=8, help="GPUs asked of each, and processes on it; 0: none (8)")
    add("--processes-per-node", type=int, help="processes on each node, if not one per GPU")
    add("--time", default="24:00:00", help="limit of one start, as sbatch takes it (24:00:00)")
    add(
        "--signal-before", type=int, default=120, help="seconds before the limit at which the run saves (120)"
    )
    add("--retries", type=int, default=3, help="starts in a row that may lose a process and save nothing (3)")
    add("--sweep", action="store_true", help="one run for each combination of key=a,b: an array of jobs")
    add("--at-once", type=int, help="runs of a sweep that may go at the same time; all by default")
    add("--shared", action="store_true", help="leave the rest of each node to other jobs")
    add("--job-name", help="the run's name by default")
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        add(f"--{name}", help="as of sbatch")
    add("--container", metavar="IMAGE", help="image for srun --container-image (pyxis)")
    add(
        "--container-mounts",
        action="append",
        default=[],
        metavar="FROM:TO",
        help="beside the run; repeatable",
    )
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="environment of the job; repeatable")
    add(
        "--sbatch-arg",
        action="append",
        default=[],
        dest="sbatch_args",
        metavar="--NAME=VALUE",
        help="repeatable",
    )
    add("--dry", action="store_true", help="print the script; write and submit nothing")
    return parser
