"""manifest.json: written last, it makes a folder a checkpoint and proves that the folder is still whole.

It records size and SHA-256 of every other file, the tensors with type and shape, the checkpoint's place in
the order of saving, and whether it is kept for good.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from parallel.groups import Group
from train.checkpoints.agreement import combine, decide
from train.checkpoints.durable import FileRecord, measure, replace_durably, write_durably

MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
CONFIG_FILE = "config.yaml"
FORMAT = 1
SCRATCH = (".partial-", ".replaced-", ".removed-")
"""Marks in the names of folders that are being written, or on their way out."""


class DamagedError(Exception):
    """A folder is not an intact checkpoint; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """An intact checkpoint. `progress` is what `save` was given; `order` grows with every save of a run."""

    path: Path
    name: str
    progress: dict[str, Any]
    permanent: bool
    order: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    order: int
    permanent: bool
    files: dict[str, FileRecord]
    tensors: dict[str, str]  # type and shape, for people; metadata.json is what a load goes by

    def write(self, folder: Path) -> None:
        """Write the file durably. Raises OSError."""
        write_durably(folder / MANIFEST_FILE, self.text())

    def text(self) -> str:
        """Return the file's content."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; DamagedError when there is none that can be understood."""
    try:
        stored = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise DamagedError(f"{MANIFEST_FILE} has format {stored['format']}, this version reads {FORMAT}")
        return Manifest(
            order=int(stored["order"]),
            permanent=bool(stored["permanent"]),
            files={name: FileRecord(**record) for name, record in stored["files"].items()},
            tensors=stored["tensors"],
        )
    except FileNotFoundError as error:
        raise DamagedError(f"{MANIFEST_FILE} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST_FILE} is unreadable: {error!r}") from error


def make_permanent(folder: Path) -> None:
    """Write a checkpoint's manifest anew, as of one that is kept for good. Raises OSError or DamagedError."""
    replace_durably(folder / MANIFEST_FILE, replace(read_manifest(folder), permanent=True).text())


def verify(folder: Path, *, group: Group | None = None) -> SavedCheckpoint:
    """Check every file of a checkpoint against its manifest. DamagedError names those that differ.

    The processes of a group, where given, share the files among themselves; all get the same answer.
    """
    manifest = decide(group, lambda: read_manifest(folder))
    faults = combine(group, lambda: _faults(folder, manifest, group), lambda parts: list(chain(*parts)))
    if faults:
        raise DamagedError("; ".join(faults))
    progress = decide(group, lambda: _read_progress(folder))
    return SavedCheckpoint(
        path=folder, name=folder.name, progress=progress, permanent=manifest.permanent, order=manifest.order
    )


def manifests(folder: Path) -> Iterator[tuple[Path, Manifest | DamagedError]]:
    """Yield every checkpoint of a run with its manifest, newest first; unreadable ones before all others."""
    found: list[tuple[Path, Manifest | DamagedError]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not any(mark in path.name for mark in SCRATCH):
            try:
                found.append((path, read_manifest(path)))
            except DamagedError as error:
                found.append((path, error))
    yield from sorted(found, key=_newest_first)


def _newest_first(entry: tuple[Path, Manifest | DamagedError]) -> tuple[bool, int, str]:
    path, manifest = entry
    if isinstance(manifest, DamagedError):
        return False, 0, path.name
    return True, -manifest.order, path.name


def _faults(folder: Path, manifest: Manifest, group: Group | None) -> list[str]:
    """Check this process's share of the files."""
    rank, size = (group.rank, group.size) if group else (0, 1)
    files = list(manifest.files.items())[rank::size]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing and reading both leave Python to other threads
        checked = pool.map(lambda entry: _fault(folder / entry[0], entry[1]), files)
        return [fault for fault in checked if fault]


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{PROGRESS_FILE} is unreadable: {error!r}") from error


def _fault(path: Path, record: FileRecord) -> str | None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            return f"{path.name} has {num_bytes} bytes instead of {record.num_bytes}"
        if measure(path) != record:
            return f"{path.name} has changed: its SHA-256 is not the recorded one"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def plain_json(values: Mapping[str, Any]) -> str:
    """Return `values` as JSON; TypeError when reading it back would give something else."""
    text = json.dumps(values, indent=1)
    if json.loads(text) != values:
        raise TypeError("progress must be plain JSON: dictionaries with string keys, lists, numbers, strings")
    return text
