"""The text of a job script: what the job is, in variables, and job.sh, which is the same in all of them."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from launch.submit.request import Request


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run: its folder and the overrides of `python -m train` that make it."""

    run_dir: Path
    overrides: list[str]


def job_script(request: Request, tasks: Sequence[Task], *, home: Path, workdir: Path, python: str) -> str:
    """Return the script that sbatch takes.

    tasks: one run, or those of a sweep: each becomes a task of a job array. home: the folder of the script
    and of what the job says. workdir: where relative paths of the overrides start. python: the interpreter,
    except in a container, which has its own. All are absolute.
    """
    parts = [
        "#!/bin/bash",
        "# Written by python -m launch submit; sbatch takes it again as it is.",
        *(f"#SBATCH {option}" for option in _options(request, tasks, home=home)),
        "set -uo pipefail",
        "",
        *_settings(request, tasks, workdir=workdir, python=python),
        "",
        *_environment(request),
        "",
        *_tasks(tasks),
    ]
    body = files("launch.submit").joinpath("job.sh").read_text(encoding="utf-8")
    return "\n".join(parts) + "\n" + body


def _options(request: Request, tasks: Sequence[Task], *, home: Path) -> Iterator[str]:
    array = len(tasks) > 1
    yield f"--job-name={request.job_name or home.parent.name}"
    if array:
        yield f"--array=0-{len(tasks) - 1}" + (f"%{request.at_once}" if request.at_once else "")
    yield f"--nodes={request.nodes}"
    yield "--ntasks-per-node=1"
    if request.gpus_per_node:
        yield f"--gpus-per-node={request.gpus_per_node}"
    if not request.shared:
        yield from ("--exclusive", "--mem=0")  # whole nodes, with all of their memory
    yield f"--time={request.time}"
    yield f"--signal=B:USR1@{request.signal_before}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={home}/job-{'%A_%a' if array else '%j'}.out"
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        if value := getattr(request, name):
            yield f"--{name}={value}"
    yield from request.sbatch_args


def _settings(request: Request, tasks: Sequence[Task], *, workdir: Path, python: str) -> Iterator[str]:
    yield f"cd {shlex.quote(str(workdir))} || exit 2"
    yield f"processes={request.processes} # on each node"
    yield f"retries={request.retries} # starts in a row that may lose a process without saving anything"
    if request.container:
        seen = dict.fromkeys([workdir, *(task.run_dir.parent for task in tasks)])
        mounts = ",".join([*(f"{folder}:{folder}" for folder in seen), *request.container_mounts])
        options = [f"--container-image={request.container}", f"--container-mounts={mounts}"]
        yield "python=python3 # the container's"
        options.append(f"--container-workdir={workdir}")
        yield "container=(" + " ".join(_quoted(option) for option in options) + ")"
    else:
        yield f"python={shlex.quote(python)}"
        yield "container=()"


def _environment(request: Request) -> Iterator[str]:
    yield "# NCCL says why it fails, and nothing else. Its network is for the cluster, or --env, to choose."
    yield "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}"
    yield "# What a rank prints is in its file at once, also when it is killed."
    yield "export PYTHONUNBUFFERED=1"
    for setting in request.env:
        key, _, value = setting.partition("=")
        yield f"export {key}={shlex.quote(value)}"


def _tasks(tasks: Sequence[Task]) -> Iterator[str]:
    """Yield what sets run_dir and overrides, and the names that follow from them."""
    if len(tasks) == 1:
        yield from _task(tasks[0])
    else:
        yield "case $SLURM_ARRAY_TASK_ID in"
        for index, task in enumerate(tasks):
            yield f"  {index})"
            yield from (f"    {line}" for line in _task(task))
            yield "    ;;"
        yield "esac"
    # of an array, the number of a task also names the whole array; its place never does
    yield "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    yield "job=${job:-$SLURM_JOB_ID}"
    yield "attempt=${SLURM_RESTART_COUNT:-0}"
    yield "logs=$run_dir/slurm/logs/$job"


def _task(task: Task) -> Iterator[str]:
    yield f"run_dir={shlex.quote(str(task.run_dir))}"
    yield f"overrides=({shlex.join(task.overrides)})"


def _quoted(word: str) -> str:
    """Return a word of an array in quotes: the commas of a list of folders look like a mistake without."""
    return quoted if (quoted := shlex.quote(word)) != word else f"'{word}'"
