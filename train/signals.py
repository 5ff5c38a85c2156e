"""Ask a run to save and stop: SIGTERM and SIGUSR1 (what schedulers send before a time limit), and Ctrl-C.

The handler only takes note; the training loop looks at `StopRequest.requested` once per step, so a stop never
falls into the middle of one. A second Ctrl-C ends the process at once, whatever it is doing: a checkpoint
that is being written is lost then, the one before it is not.

A signal that comes before the handler stands is lost, and imports take seconds. So a launcher may also make a
file, whose path it gave in FATHOM_STOP_FILE; the first process looks for it once per step.
"""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch.distributed import ReduceOp

from parallel.groups import Group

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE_VARIABLE = "FATHOM_STOP_FILE"
STDERR = 2


class StopRequest:
    """Context manager, for the main thread, in which the watched signals set `requested`.

    On leaving, the handlers that were there before are restored.
    """

    def __init__(self) -> None:
        self._requested: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    @property
    def requested(self) -> str | None:
        """Name of the first signal that asked for a stop, such as "SIGTERM"; None while none has."""
        return self._requested.name if self._requested else None

    def agreed(self, world: Group) -> str | None:
        """Return the name of a signal that any process has received, the same answer on all of them.

        They call this together, because a signal may reach only some, or reach them at different steps. A
        stop file counts as SIGUSR1.
        """
        self._look_for_file()
        own = self.requested
        number = torch.tensor([signal.Signals[own] if own else 0], device=world.device)
        received = int(world.all_reduce(number, op=ReduceOp.MAX))
        return signal.Signals(received).name if received else None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python; it cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _look_for_file(self) -> None:
        path = os.environ.get(STOP_FILE_VARIABLE)
        if self._requested is None and path and _is_first() and Path(path).exists():
            self._requested = signal.SIGUSR1
            self._say(signal.SIGUSR1, interactive=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        repeated = self._requested is not None
        self._requested = self._requested or received
        interactive = received is signal.SIGINT
        if interactive:
            # From now on the system itself ends the process: even where Python would wait for a thread.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # one line for the whole job: a launcher sends the signal to every process
        if _is_first() and (not repeated or interactive):
            self._say(received, interactive)

    def _say(self, received: signal.Signals, interactive: bool) -> None:
        again = "; press Ctrl-C again to end at once without saving" if interactive else ""
        line = f"\n{received.name}: saving a checkpoint after this step, then stopping{again}\n"
        os.write(STDERR, line.encode())  # print() may be interrupted by, and then refuse, itself


def _is_first() -> bool:
    """Return whether this is the first process of the job, or the only one."""
    return os.environ.get("RANK", "0") == "0"
