"""The processes of a job as the trainer sees them: who leads, and how the others wait for the leader."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.distributed import Store

from data.errors import DataError
from parallel.groups import Group, Trace
from parallel.process import Processes, join
from parallel.watchdog import Watchdog
from train.errors import EXIT_BAD_INPUT, RunError, exit_cleanly

POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process among those of the job.

    world: all of them; trace: of this process's collectives; watchdog: of its peers.
    """

    processes: Processes
    device: torch.device
    world: Group
    trace: Trace
    watchdog: Watchdog
    _turns: Iterator[int] = field(default_factory=count)

    @property
    def leads(self) -> bool:
        """Return whether this is the process that prints, logs, evaluates and reports."""
        return self.processes.rank == 0

    def lead(self, work: Callable[[], object]) -> None:
        """Let the leader do `work` while the others wait for it, however long it takes.

        They look into the store rather than wait in a collective, which would have to end in time. All
        processes call this together; a mistake that the leader finds is raised on all.
        """
        turn = f"lead-{next(self._turns)}"
        store = self.processes.store
        if store is None:
            work()
        elif self.leads:
            self._lead(work, store, turn)
        else:
            while not store.check([turn]):
                time.sleep(POLL_S)
            if mistake := json.loads(store.get(turn)):
                raise RunError(mistake["error"], exit_code=mistake["exit_code"])

    def _lead(self, work: Callable[[], object], store: Store, turn: str) -> None:
        mistake: dict[str, Any] = {"error": "the leader failed; see what it printed", "exit_code": 1}
        try:
            work()
            mistake = {}
        except RunError as error:
            mistake = {"error": str(error), "exit_code": error.exit_code}
            raise
        except DataError as error:
            mistake = {"error": str(error), "exit_code": EXIT_BAD_INPUT}
            raise
        finally:
            store.set(turn, json.dumps(mistake))


@contextmanager
def assemble(environ: Mapping[str, str], *, device: torch.device, timeout_s: int) -> Iterator[Team]:
    """Join the other processes of the job, watched; an error of all is reported once."""
    trace = Trace()
    with join(environ, device=device, timeout_s=timeout_s) as processes, exit_cleanly(processes):
        watchdog = Watchdog(processes, trace=trace, timeout_s=timeout_s)
        # without a handle of its own: the default group of torch.distributed
        world = Group("world", range(processes.world_size), rank=processes.rank, trace=trace)
        with watchdog, watchdog.guard():
            yield Team(processes=processes, device=device, world=world, trace=trace, watchdog=watchdog)


def alone(device: torch.device) -> Team:
    """Return the team of one process."""
    processes, trace = Processes(), Trace()
    watchdog = Watchdog(processes, trace=trace, timeout_s=1.0)
    return Team(processes=processes, device=device, world=Group("world"), trace=trace, watchdog=watchdog)
