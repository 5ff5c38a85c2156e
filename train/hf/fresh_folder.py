"""A folder that appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from train.errors import RunError


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    RunError when `target` holds something already, or when the disk refuses.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RunError(f"{target} exists already; name a new folder, nothing is overwritten")
    partial = target.with_name(target.name + ".partial")
    try:
        # What a killed conversion left behind is worth nothing.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} could not be written: {error}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
