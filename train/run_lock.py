"""One process at a time works on a run: two would mix their metrics and replace each other's checkpoints.

The lock is the system's, on a file beside the run directory, so it ends with its process however that ends.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import RunError


@contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run. RunError when another process holds it, or its file cannot be made."""
    path = run_dir.with_name(f".{run_dir.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise RunError(f"{path} cannot be made: {error}; use another root=") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process works on {run_dir}; wait for it or end it, or give this run its own name="
            ) from error
        except OSError:
            pass  # a file system without locks: go on without
        yield
