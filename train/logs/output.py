"""A command whose output nobody takes any more: `| head -1`, a terminal that was closed, a disk that is full.

Training goes on without (`outlive_readers`), because the run directory has all that it prints. Any other
command ends (`watch_output`, in train/errors.py), by an exception that is not mistaken for another pipe's.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class LostOutputError(Exception):
    """stdout or stderr cannot be written, for the system's `reason`; what follows on it goes nowhere."""

    def __init__(self, name: str, reason: OSError) -> None:
        super().__init__(f"{name} cannot be written: {reason.strerror}")
        self.reason = reason


@contextmanager
def watch_output() -> Iterator[None]:
    """Raise LostOutputError in the body, or at its end, when what it prints cannot be written."""

    def end(lost: LostOutputError) -> None:
        raise lost

    with _outputs(end):
        yield


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Let what the body prints be lost rather than end it, and say so once on stderr."""
    stderr = sys.stderr  # a progress bar puts another in its place

    def note(lost: LostOutputError) -> None:
        with suppress(OSError, LostOutputError):  # nobody is left to tell
            print(f"note: {lost}; the run goes on, metrics.jsonl has every step", file=stderr, flush=True)

    with _outputs(note):
        yield


def settle_output() -> None:
    """Hand over what is buffered, or drop it: Python at its end would complain and change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before the command began
        try:
            stream.flush()
        except LostOutputError:
            pass  # dropped already
        except OSError:
            _send_nowhere(stream)


class _Output:
    """A text stream that calls `lost` instead of failing; it is otherwise the stream it stands before."""

    def __init__(self, stream: TextIO, name: str, lost: Callable[[LostOutputError], None]) -> None:
        self._stream = stream
        self._name = name
        self._lost = lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except LostOutputError as lost:  # where one of these stands before another
            self._lost(lost)
        except OSError as error:
            _send_nowhere(self._stream)
            self._lost(LostOutputError(self._name, error))


@contextmanager
def _outputs(lost: Callable[[LostOutputError], None]) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, stream and _Output(stream, name, lost))
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    watched = sys.stdout, sys.stderr
    try:
        yield
        for stream in filter(None, watched):
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before


def _send_nowhere(stream: TextIO) -> None:
    """Let all that is written to a stream, what it has buffered included, go to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
