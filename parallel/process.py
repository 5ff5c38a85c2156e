"""The processes of one job: who this one is, how they meet, and how they part.

A launcher (torchrun, or Slurm through launch/) starts the same program many times and tells each copy through
environment variables which one it is: RANK of WORLD_SIZE, LOCAL_RANK on its machine, and MASTER_ADDR and
MASTER_PORT of a key-value store that all can reach. `join` meets there, names whoever does not come, and
makes torch.distributed ready. A program started without a launcher is a job of one process, and nothing is
initialised.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.errors import ProcessError

BACKEND_SLACK_S = 30
"""How much longer the collectives wait than the watchdog does, so that it can say who is missing."""

PARTING_S = 60
"""How long rank 0, which may keep the store, waits at the end for the others to be done with it."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Processes:
    """This process among those of the job.

    store: a key-value store shared by all, on a connection that the collectives do not use, so that it
    answers while they wait; its keys are those of this attempt alone. None in a job of one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None


def processes_of_environment(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as the launcher set them; (0, 1, 0) when it set none.

    ProcessError when only some are set, or they are not numbers that fit each other.
    """
    given = {name: environ[name] for name in VARIABLES if name in environ}
    if not given:
        return 0, 1, 0
    shown = ", ".join(f"{name}={environ.get(name, '(not set)')}" for name in VARIABLES)
    remedy = "start the job with torchrun, or unset them for one process"
    if len(given) < len(VARIABLES) or not all(value.isdecimal() for value in given.values()):
        raise ProcessError(f"{shown}: each must be a number; {remedy}")
    rank, world_size, local_rank = (int(given[name]) for name in VARIABLES)
    if rank >= world_size or local_rank > rank:
        raise ProcessError(f"{shown}: LOCAL_RANK <= RANK < WORLD_SIZE must hold; {remedy}")
    return rank, world_size, local_rank


@contextmanager
def join(environ: Mapping[str, str], *, device: torch.device, timeout_s: int) -> Iterator[Processes]:
    """Be one of the job's processes, with torch.distributed ready for CPU tensors and for those of `device`.

    All have to come within timeout_s; a collective may take BACKEND_SLACK_S longer than that. torch itself
    reads MASTER_ADDR and MASTER_PORT from the environment of the process. When the body ends well the
    processes part together. When it raises, nothing is torn down, because that could wait for processes which
    are gone: leave with os._exit, as train/errors.py does.

    ProcessError when the variables are wrong or a process does not come.
    """
    rank, world_size, local_rank = processes_of_environment(environ)
    if world_size == 1:
        yield Processes()
        return
    store = _meet(rank, world_size, timeout_s, attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        _start_backend(dist.PrefixStore("collectives", store), rank, world_size, device, timeout_s)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"rank {rank} cannot start torch.distributed: {error}") from error
    private = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub lacks it
    yield Processes(rank, world_size, local_rank, private)
    dist.destroy_process_group()
    _part(store, rank, world_size)


def _meet(rank: int, world_size: int, timeout_s: int, *, attempt: str) -> dist.Store:
    """Return the store of this attempt when every process has reached it."""
    timeout = timedelta(seconds=timeout_s)
    try:
        # the number of the attempt keeps a restarted job from the keys of the one before
        found, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store = dist.PrefixStore(f"attempt-{attempt}", found)
        store.set(f"here-{rank}", "")
        if store.add("number-here", 1) == world_size:
            store.set("all-here", "")
    except (ValueError, dist.DistError) as error:
        raise ProcessError(f"rank {rank} of {world_size} cannot reach the others: {error}") from error
    try:
        store.wait(["all-here"], timeout)
    except dist.DistError as error:
        raise ProcessError(_absence(store, rank, world_size, timeout_s)) from error
    return store


def _start_backend(
    store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_s: int
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s + BACKEND_SLACK_S),
    )


def _absence(store: dist.Store, rank: int, world_size: int, timeout_s: int) -> str:
    waited = f"rank {rank} waited {timeout_s} s for the other processes"
    try:
        absent = [str(other) for other in range(world_size) if not store.check([f"here-{other}"])]
    except dist.DistError as error:
        return f"{waited}, then lost their store: {error}"
    shown = ", ".join(absent[:16]) + (", …" if len(absent) > 16 else "")
    return f"{waited}; {len(absent)} of {world_size} did not come: rank {shown}; look at what they print"


def _part(store: dist.Store, rank: int, world_size: int) -> None:
    """Let rank 0 stay until all have left: without a launcher's store, the one it keeps ends with it."""
    with suppress(dist.DistError):  # whoever does not come any more is not missed: the work is done
        if store.add("number-parted", 1) == world_size:
            store.set("all-parted", "")
        if rank == 0:
            store.wait(["all-parted"], timedelta(seconds=PARTING_S))
