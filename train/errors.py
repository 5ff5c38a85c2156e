"""A user's mistake ends a command with one message and a documented exit code, never with a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import DataError
from model.errors import WeightsError

EXIT_BAD_INPUT = 2
"""The configuration, data, checkpoint or machine does not allow what was asked; nothing was started."""

EXIT_UNSTABLE = 3
"""Too many steps in a row had a non-finite loss or gradient."""

EXIT_STOPPED = 75
"""A signal asked the run to stop; its state is saved and the same command continues it (EX_TEMPFAIL)."""


class RunError(Exception):
    """Something the person who started the command can mend; `exit_code` is the process's."""

    def __init__(self, message: str, *, exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn the errors that people can mend into one message on stderr and an exit code."""
    try:
        yield
    except RunError as error:
        mistake = "" if error.exit_code == EXIT_STOPPED else "error: "
        print(f"{mistake}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (DataError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
