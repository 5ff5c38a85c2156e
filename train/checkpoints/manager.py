"""Checkpoints of a run: saved in the background, complete or absent, verified before they are used.

A checkpoint is written under another name, put on the disk file by file, its manifest last, and only then
renamed; a process that is killed at any moment leaves the checkpoint before it. A run keeps the last few,
and every one that is permanent (the end of a stage).

    checkpoints/NAME/{shard-RRRRR-FFF.safetensors, metadata.json, progress.json, config.yaml, manifest.json}

The processes of a job write one checkpoint together, into one folder that all of them see. Each puts what it
owns into files of its own; the first one does everything else. What fails on one of them has failed on all.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.groups import Group
from parallel.pieces import Holding, Piece, Pieces
from train.checkpoints.agreement import background_group, decide, is_first
from train.checkpoints.durable import FileRecord, sync_folder, write_durably
from train.checkpoints.manifest import (
    CONFIG_FILE,
    PROGRESS_FILE,
    DamagedError,
    Manifest,
    SavedCheckpoint,
    make_permanent,
    manifests,
    plain_json,
    verify,
)
from train.checkpoints.metadata import read_metadata, types_and_shapes
from train.checkpoints.storage import load_tensors, save_tensors
from train.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything of one checkpoint, beyond the reach of the training step that follows."""

    name: str
    tensors: Mapping[str, Holding]
    progress_json: str
    config_yaml: str
    permanent: bool


class CheckpointManager:
    """Saves, retires and finds the checkpoints in one folder; a run has one manager at a time.

    Making one removes what a killed process left half-written. RunError when the folder cannot be used.

    With a `group`, all its processes make a manager and call its methods together, in one order. Each gives
    and takes the tensors it holds; progress and configuration are those of the first process. Every error is
    raised on all of them. All processes of the world take part in making the manager.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, asynchronous: bool, group: Group | None = None
    ) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._group = background_group(group)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._in_flight: Future[None] | None = None
        try:
            decide(self._group, self._open)
        except OSError as error:
            raise RunError(
                f"checkpoint folder {folder} cannot be used: {error}; free it or use another root="
            ) from error

    def save(
        self,
        name: str,
        tensors: Mapping[str, Holding],
        progress: Mapping[str, Any],
        *,
        config_yaml: str,
        permanent: bool,
    ) -> None:
        """Save `tensors` and `progress`, replacing a checkpoint of the same name.

        In the background, where asked for: the tensors are copied first, so they may change as soon as
        this returns. A save waits for the one before it, and raises what went wrong there.

        Raises:
            RunError: a checkpoint, this one or in the background the one before, could not be written;
                the ones already there are untouched.
        """
        self.wait()
        snapshot = Snapshot(
            name=name,
            tensors=_copies(tensors) if self._writer else tensors,
            progress_json=plain_json(progress),
            config_yaml=config_yaml,
            permanent=permanent,
        )
        if self._writer:
            self._in_flight = self._writer.submit(self._write, snapshot)
        else:
            self._write(snapshot)

    def wait(self) -> None:
        """Return when nothing is being written. Raises RunError when the last save failed."""
        if self._in_flight:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def latest(self) -> SavedCheckpoint | None:
        """Return the newest intact checkpoint, or None where nothing was ever saved; see `newest_intact`."""
        self.wait()
        return newest_intact(self._folder, group=self._group)

    def load(self, saved: SavedCheckpoint, tensors: Mapping[str, Holding]) -> None:
        """Fill `tensors` in place with all of a checkpoint's.

        Raises:
            RunError: naming every missing, extra, misshaped or mistyped tensor; then nothing was written.
        """
        self.wait()
        load_tensors(saved.path, tensors, group=self._group)

    def keep(self, saved: SavedCheckpoint) -> None:
        """Make a checkpoint permanent. Raises RunError when its manifest cannot be rewritten."""
        self.wait()
        try:
            decide(self._group, lambda: make_permanent(saved.path))
        except (OSError, DamagedError) as error:
            raise RunError(f"checkpoint {saved.path} cannot be kept: {error}; make room or fix it") from error

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()

    def _write(self, snapshot: Snapshot) -> None:
        path = self._folder / snapshot.name
        partial = decide(self._group, lambda: self._scratch(path, ".partial-"))
        try:
            decide(self._group, partial.mkdir)
            files = save_tensors(partial, snapshot.tensors, group=self._group)
            decide(self._group, lambda: self._complete(partial, path, snapshot, files))
        except OSError as error:
            last_good = decide(self._group, lambda: self._abandon(partial))
            raise RunError(
                f"checkpoint {path} could not be saved: {error}; make room or fix the folder, then give the "
                f"same command again. {last_good}"
            ) from error

    def _complete(self, partial: Path, path: Path, snapshot: Snapshot, files: dict[str, FileRecord]) -> None:
        """Make a checkpoint of a folder with everybody's tensors, and retire what it supersedes."""
        files[PROGRESS_FILE] = write_durably(partial / PROGRESS_FILE, snapshot.progress_json)
        files[CONFIG_FILE] = write_durably(partial / CONFIG_FILE, snapshot.config_yaml)
        Manifest(
            order=1 + max(self._orders().values(), default=0),
            permanent=snapshot.permanent,
            files=files,
            tensors=types_and_shapes(read_metadata(partial)),
        ).write(partial)
        sync_folder(partial)
        self._publish(partial, path)
        self._retire()

    def _abandon(self, partial: Path) -> str:
        """Remove what was written of a checkpoint that failed; return which one remains, in words."""
        shutil.rmtree(partial, ignore_errors=True)  # what stays is cleared by the next start
        newest = next(iter(self._orders()), None)
        return (
            f"The last good checkpoint, {newest}, is kept." if newest else "There is no earlier checkpoint."
        )

    def _publish(self, partial: Path, path: Path) -> None:
        replaced = self._scratch(path, ".replaced-")
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        sync_folder(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _retire(self) -> None:
        """Remove all but the last `keep_last` of the checkpoints that are not permanent."""
        passing = [
            path
            for path, manifest in manifests(self._folder)
            if isinstance(manifest, Manifest) and not manifest.permanent
        ]
        for path in passing[self._keep_last :]:
            removed = self._scratch(path, ".removed-")
            path.rename(removed)  # first, so that no one ever finds half a checkpoint
            shutil.rmtree(removed, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for path in self._folder.glob("*.replaced-*"):
            original = self._folder / path.name.partition(".replaced-")[0]
            if not original.exists():  # killed between the two renames of `_publish`
                path.rename(original)
        for mark in (".partial-", ".replaced-", ".removed-"):
            for path in self._folder.glob(f"*{mark}*"):
                shutil.rmtree(path)

    def _orders(self) -> dict[Path, int]:
        return {
            path: manifest.order
            for path, manifest in manifests(self._folder)
            if isinstance(manifest, Manifest)
        }

    def _scratch(self, path: Path, mark: str) -> Path:
        return path.with_name(f"{path.name}{mark}{os.getpid()}-{secrets.token_hex(4)}")


def newest_intact(
    folder: Path, *, stage: str | None = None, group: Group | None = None
) -> SavedCheckpoint | None:
    """Return the newest checkpoint in `folder` that passes verification, of the end of `stage` if given.

    A damaged one is named on stderr with the reason, and the one before it is tried. None where there is
    no checkpoint at all. The processes of a group call this together and get the same answer.

    Raises:
        RunError: when there are checkpoints and none is intact, listing all with their reasons.
    """
    damaged: list[str] = []
    for path, manifest in decide(group, lambda: list(manifests(folder))):
        if stage is not None and not _ends_stage(path, manifest, stage):
            continue
        try:
            if isinstance(manifest, DamagedError):
                raise manifest
            saved = verify(path, group=group)
        except DamagedError as error:
            damaged.append(f"{path}: {error}")
            if is_first(group):
                print(f"checkpoint {path} is damaged ({error}); trying the one before it", file=sys.stderr)
            continue
        return saved
    if damaged:
        raise RunError(
            f"no checkpoint in {folder} is intact:\n"
            + "\n".join(f"  {line}" for line in damaged)
            + "\nrestore one of them, or move the folder away to start again"
        )
    return None


def _ends_stage(path: Path, manifest: Manifest | DamagedError, stage: str) -> bool:
    of_stage = path.name.rpartition("-")[0] == stage
    return of_stage and (isinstance(manifest, DamagedError) or manifest.permanent)


@torch.no_grad()
def _copies(tensors: Mapping[str, Holding]) -> dict[str, Holding]:
    """Return copies in the host's memory."""
    return {name: _copy(held) for name, held in tensors.items()}


def _copy(held: Holding) -> Holding:
    if isinstance(held, Pieces):
        copies = (Piece(p.offsets, p.tensor.detach().to("cpu", copy=True)) for p in held.pieces)
        return replace(held, pieces=tuple(copies))
    return held.detach().to("cpu", copy=True)
