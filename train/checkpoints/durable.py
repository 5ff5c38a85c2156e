"""Files that are on the disk when they say so, and that know their own checksum.

A checkpoint is trusted after a power cut, so every byte is flushed with fsync, the entries of the folder too;
SHA-256 is computed while writing, so that no second reading is needed (`sha256sum` gives the same).
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 1 << 22
"""What is hashed and handed to the system at a time; small enough to be still in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a manifest knows about a file."""

    num_bytes: int
    sha256: str


class HashingFile:
    """A file being written, whose `record` is complete at any moment."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises OSError, for one when the disk is full."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._hash.update(piece)
            self._file.write(piece)
        self._num_bytes += len(view)

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what has been written so far."""
        return FileRecord(num_bytes=self._num_bytes, sha256=self._hash.hexdigest())


@contextmanager
def durable_file(path: Path) -> Iterator[HashingFile]:
    """Open a new file; leaving the block puts it on the disk. Raises OSError also when it exists."""
    with path.open("xb") as file:
        yield HashingFile(file)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> FileRecord:
    """Write a new text file, UTF-8, and put it on the disk."""
    with durable_file(path) as file:
        file.write(text.encode())
    return file.record


def replace_durably(path: Path, text: str) -> None:
    """Give a text file, and a folder for it, a new content; whatever happens, it has the old or the new one.

    Raises OSError, and leaves nothing behind then.
    """
    # Named after the process: two may write the same report, and must not write into each other's draft.
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        write_durably(draft, text)
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk; else a new or renamed file may be gone after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> FileRecord:
    """Read a file and return its size and checksum."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(num_bytes=file.tell(), sha256=digest.hexdigest())
