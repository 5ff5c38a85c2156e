"""A user's mistake ends a command with one message and a documented exit code, never with a traceback.

| code | meaning |
| --- | --- |
| 0 | done |
| 2 | bad configuration, data, checkpoint, environment or launcher; nothing was started |
| 2 | a file cannot be written, as on a full or read-only disk; then the same command continues |
| 3 | too many steps in a row were not finite |
| 4 | a process of the job died or hung; the others were ended |
| 75 | stopped by a signal after saving; the same command continues |
| 141 | nobody reads what the command prints (`| head`); only training goes on |

A job of many processes prints a mistake that all of them make once. Rank 0 speaks first; another rank speaks,
with its number in front, when it alone made the mistake. torchrun itself exits with 1 and lists these codes.
"""

import errno
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from model.errors import WeightsError
from parallel.errors import EXIT_LOST, LostRankError, ProcessError
from train.logs.output import LostOutputError, settle_output, watch_output

if TYPE_CHECKING:  # importing it loads torch, which takes longer than to answer `--help`
    from parallel.process import Processes

EXIT_BAD_INPUT = 2
"""The configuration, data, checkpoint, machine or disk does not allow what was asked."""

EXIT_UNSTABLE = 3
"""Too many steps in a row had a non-finite loss or gradient."""

EXIT_STOPPED = 75
"""A signal asked the run to stop; its state is saved and the same command continues it (EX_TEMPFAIL)."""

EXIT_CLOSED_PIPE = 141
"""Nobody reads what a command prints; 128 + SIGPIPE, as of any program that a shell ends for it."""

HEAD_START_S = 1
"""How long the other processes of a job that has met leave it to rank 0 to report a mistake."""

UNMET_HEAD_START_S = 5
"""The same before they can ask each other; by then the launcher has ended whoever would say it again."""


class RunError(Exception):
    """Something the person who started the command can mend; `exit_code` is the process's."""

    def __init__(self, message: str, *, exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def exit_cleanly(processes: "Processes | None" = None) -> Iterator[None]:
    """Turn the errors that people can mend into one message on stderr and an exit code.

    processes: give them inside `join`; they then leave without waiting for each other. Around it, or in a
    command of one process, leave them out.
    """
    try:
        with watch_output():
            yield
    except RunError as error:
        mistake = "" if error.exit_code == EXIT_STOPPED else "error: "
        report(f"{mistake}{error}", processes)
        _leave(error.exit_code, processes)
    except (DataError, WeightsError, ProcessError) as error:
        report(f"error: {error}", processes)
        _leave(EXIT_BAD_INPUT, processes)
    except LostRankError:  # the watchdog has printed it
        _leave(EXIT_LOST, processes)
    except LostOutputError as lost:
        if lost.reason.errno == errno.EPIPE:
            _leave(EXIT_CLOSED_PIPE, processes)
        report(f"error: {lost}; {_remedy(lost.reason)}", processes)
        _leave(EXIT_BAD_INPUT, processes)
    finally:
        settle_output()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError when the body, which writes `path`, is refused by the system."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}; {_remedy(error)}") from error


def report(message: str, processes: "Processes | None" = None) -> None:
    """Print `message` on stderr, in a job of many processes only if no other process prints the same.

    processes: see `exit_cleanly`.
    """
    if processes is None:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # The launcher ends the processes of a machine when one has left: before these waits are over.
            first_of_machine = os.environ.get("LOCAL_RANK") == "0"
            time.sleep(UNMET_HEAD_START_S if first_of_machine else 2 * UNMET_HEAD_START_S)
        said = False
    else:
        rank = str(processes.rank)
        said = _said(message, processes)
    if said:
        return
    with suppress(OSError, LostOutputError):  # nobody is left to read it; the code still says it
        print(message if rank == "0" else f"rank {rank}: {message}", file=sys.stderr)


def _said(message: str, processes: "Processes") -> bool:
    """Return whether another process has printed `message`; if not, this one is the one to do so."""
    if processes.store is None:
        return False
    if processes.rank > 0:
        time.sleep(HEAD_START_S)
    try:
        return processes.store.add(f"said-{zlib.crc32(message.encode()):08x}", 1) > 1
    except RuntimeError:  # torch's DistError: the store has left with whoever kept it
        return False


def _leave(code: int, processes: "Processes | None") -> None:
    if processes is not None and processes.world_size > 1:
        # Ending the interpreter would tear down process groups, which waits for the others, or complains.
        settle_output()
        os._exit(code)
    sys.exit(code)


def _remedy(refusal: OSError) -> str:
    full = refusal.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{'make room' if full else 'make it writable'}, then give the same command again"
