"""Processes started as a launcher would, for tests that end them in every way."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.forked import uncollected

STUCK_S = 25


class Started:
    """The processes of one job, forked after torch was imported, with their output in files of `folder`."""

    def __init__(self, folder: Path, environments: list[dict[str, str]], main: Callable[[], None]) -> None:
        self.folder = folder
        context = multiprocessing.get_context("fork")
        # The store's thread in this process asks who it is that connects, under a lock of the C library.
        # A process forked meanwhile gets the lock held, for ever: none may connect before all are there.
        forked = context.Event()
        self.processes = [
            context.Process(target=_run, args=(folder / str(index), environment, forked, main), daemon=True)
            for index, environment in enumerate(environments)
        ]
        with uncollected():
            for process in self.processes:
                process.start()
        forked.set()

    def wait_for(self, text: str, *, ranks: list[int], within_s: float = 30) -> None:
        """Return when each of `ranks` has printed `text`."""
        deadline = time.monotonic() + within_s
        while not all(text in self.printed(rank) for rank in ranks):
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.02)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid or 0, number)

    def exit_codes(self, *, ranks: list[int], within_s: float) -> list[int | None]:
        """Return the exit codes of `ranks`, which must leave within that time."""
        deadline = time.monotonic() + within_s
        for rank in ranks:
            self.processes[rank].join(timeout=max(0.0, deadline - time.monotonic()))
        assert all(self.processes[rank].exitcode is not None for rank in ranks), self.outputs()
        return [self.processes[rank].exitcode for rank in ranks]

    def printed(self, rank: int) -> str:
        """Return what a rank has written to stdout and stderr so far."""
        path = self.folder / str(rank)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def outputs(self) -> dict[int, str]:
        """Return what every rank has written so far."""
        return {rank: self.printed(rank) for rank in range(len(self.processes))}

    def messages(self) -> list[str]:
        """Return the lines of all ranks that are messages for people."""
        return [
            line
            for text in self.outputs().values()
            for line in text.splitlines()
            if "error: " in line.lower()
        ]


@contextmanager
def started(
    folder: Path,
    world_size: int,
    main: Callable[[], None],
    *,
    launcher_keeps_store: bool = True,
    store: dist.TCPStore | None = None,
    **more: str,
) -> Iterator[Started]:
    """Start `main` in every process with a launcher's variables, `more` on top; end all in the end.

    launcher_keeps_store: as torchrun does, in `store` or a new one; otherwise rank 0 keeps it, as under srun.
    """
    folder.mkdir(exist_ok=True)
    if launcher_keeps_store and store is None:
        store = launcher_store()
    port = store.port if store else free_port()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": str(launcher_keeps_store),
    }
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    job = Started(folder, [shared | each | more for each in own], main)
    try:
        yield job
    finally:
        for process in job.processes:
            process.kill()
            process.join()


def launcher_store() -> dist.TCPStore:
    """Return the store that a launcher would keep, when its thread has let this process in and waits."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("launched", "")
    return store


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(output: Path, environment: dict[str, str], forked: Event, main: Callable[[], None]) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ |= environment
    faulthandler.dump_traceback_later(STUCK_S, file=sys.stderr)  # into what `wait_for` shows when it gives up
    torch.set_num_threads(1)
    forked.wait()
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
