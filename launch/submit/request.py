"""What is asked of Slurm for a job, and everything in it that Slurm or the job script would trip over."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SLOWEST_NOTICE_S = 60
"""How much earlier than asked Slurm may send the signal (sbatch(1), --signal)."""

MAX_NOTICE_S = 65535
"""The longest notice that Slurm can store."""

OURS = (
    "array",
    "exclusive",
    "gpus-per-node",
    "job-name",
    "mem",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "time",
)
"""Options of sbatch that the job script depends on; they are set by options of the command alone."""

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One job, or an array of jobs alike, in the words of sbatch(1); None leaves a thing to the cluster.

    time: the limit as sbatch takes it, such as "24:00:00" or "2-12". signal_before: seconds between the
    signal to save and the limit. retries: starts in a row that may lose a process without saving anything.
    at_once: tasks of a sweep that may run together. shared: other jobs may use the rest of a node.
    container_mounts: FROM:TO. env: KEY=VALUE. sbatch_args: each "--name" or "--name=value".
    """

    nodes: int
    gpus_per_node: int = 8
    processes_per_node: int | None = None
    time: str = "24:00:00"
    signal_before: int = 120
    retries: int = 3
    at_once: int | None = None
    shared: bool = False
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    container: str | None = None
    container_mounts: Sequence[str] = ()
    env: Sequence[str] = ()
    sbatch_args: Sequence[str] = ()

    @property
    def processes(self) -> int:
        """Return the processes of each node: one per GPU unless told otherwise."""
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node

    @property
    def world_size(self) -> int:
        """Return the processes of the job."""
        return self.nodes * self.processes

    def problems(self) -> list[str]:
        """Return every broken rule, each with the option, its value and a remedy."""
        return [*self._counts(), *self._times(), *self._words(), *self._environment(), *self._sbatch()]

    def _counts(self) -> Iterator[str]:
        if self.nodes < 1:
            yield f"--nodes {self.nodes} must be at least 1"
        if self.gpus_per_node < 0:
            yield f"--gpus-per-node {self.gpus_per_node} must not be negative; use 0 where nodes have none"
        elif self.processes_per_node is None and self.gpus_per_node == 0:
            yield "--gpus-per-node 0 leaves no process on a node; use --processes-per-node for a job on CPUs"
        if self.processes_per_node is not None and self.processes_per_node < 1:
            yield f"--processes-per-node {self.processes_per_node} must be at least 1"
        if self.retries < 0:
            yield f"--retries {self.retries} must not be negative; use 0 for none"
        if self.at_once is not None and self.at_once < 1:
            yield f"--at-once {self.at_once} must be at least 1"

    def _times(self) -> Iterator[str]:
        limit = seconds(self.time)
        if limit is None:
            yield f"--time {self.time} is not a time of Slurm; use HOURS:MINUTES:SECONDS or DAYS-HOURS"
        if not 1 <= self.signal_before <= MAX_NOTICE_S:
            yield f"--signal-before {self.signal_before} must lie in 1 to {MAX_NOTICE_S} seconds; use 120"
        elif limit is not None and self.signal_before + SLOWEST_NOTICE_S >= limit:
            yield (
                f"--signal-before {self.signal_before} leaves nothing of --time {self.time}, since Slurm may "
                f"send it {SLOWEST_NOTICE_S} s earlier; use a longer time"
            )

    def _words(self) -> Iterator[str]:
        for name in ("job_name", "partition", "account", "qos", "constraint", "exclude", "container"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^\s%\"'\\]+", value):
                option = name.replace("_", "-")
                yield f"--{option} {value!r} must be one word without quotes, '%' and '\\'"
        if self.container_mounts and self.container is None:
            yield f"--container-mounts {', '.join(self.container_mounts)} needs --container IMAGE"
        for mount in self.container_mounts:
            if not re.fullmatch(r"/[^\s:,]*:/[^\s:,]*(:[a-z+]+)?", mount):
                yield f"--container-mounts {mount!r} must be /FROM:/TO, with absolute paths"

    def _environment(self) -> Iterator[str]:
        for setting in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*=[^\n]*", setting):
                yield f"--env {setting!r} must be KEY=VALUE on one line"

    def _sbatch(self) -> Iterator[str]:
        for option in self.sbatch_args:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
                yield f"--sbatch-arg {option!r} must have the form --sbatch-arg=--name=value"
            elif (name := option[2:].partition("=")[0]) in OURS:
                yield f"--sbatch-arg {option}: the job script depends on --{name}; {_remedy(name)}"


def seconds(time: str) -> float | None:
    """Return a time limit in seconds: infinity for Slurm's words for none, None for what is not a time.

    "M", "M:S", "H:M:S", and behind "DAYS-": "H", "H:M", "H:M:S" (sbatch(1), --time).
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = TIME.fullmatch(time)
    if match is None:
        return None
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:
        units = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    total = int(match["days"] or 0) * 86400
    return total + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _remedy(name: str) -> str:
    own = {"array": "--sweep", "exclusive": "--shared", "signal": "--signal-before"}
    if name in ("gpus-per-node", "job-name", "nodes", "time"):
        own[name] = f"--{name}"
    return f"use {own[name]}" if name in own else "it cannot be changed"
