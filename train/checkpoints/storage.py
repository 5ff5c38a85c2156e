"""Tensors of one process or of many into a folder and back, under any layout.

`torch.distributed.checkpoint` (DCP) plans who writes and reads which box of which tensor
(train/checkpoints/planning.py), so that a checkpoint written under one layout loads under any other; the file
format is our own (train/checkpoints/shards.py). Every process writes what it owns and reads what it owns: no
tensor travels between processes. They act together only when they are asked to with a `group`; without one, a
process acts for itself, whatever others there are.
"""

from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.tensor import DTensor

from parallel.groups import Group
from parallel.pieces import Holding, Pieces
from train.checkpoints.agreement import combine, decide, raise_first
from train.checkpoints.coverage import survey, verdict
from train.checkpoints.durable import FileRecord
from train.checkpoints.metadata import read_metadata
from train.checkpoints.planning import PiecesLoadPlanner, PiecesSavePlanner
from train.checkpoints.shards import SHARD_BYTES, SafetensorsReader, SafetensorsWriter
from train.errors import RunError


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Holding],
    *,
    group: Group | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, FileRecord]:
    """Write tensors (plain, DTensors of any placement, or pieces) into an existing folder.

    With a group, its processes call this together, each with what it holds, and each box that several of them
    hold is written once. A process may leave out a tensor of which it holds nothing. Returns all the files,
    on the first process; elsewhere an empty dict.

    Raises:
        OSError: a process could not write; on all of them.
        ValueError: the processes together do not hold every element of a tensor, or disagree about its shape
            or type; on all of them, and nothing was written.
    """
    writer = SafetensorsWriter(folder, shard_bytes=shard_bytes)
    handle = group.handle if group else None
    try:
        # What dcp.save calls once it has warned that there is no process group. Silencing the warning is
        # not possible here: warning filters belong to the process, and this may run in a thread.
        _save_state_dict(
            dict(tensors),
            writer,
            process_group=handle,
            no_dist=handle is None,
            planner=PiecesSavePlanner(),
        )
    except CheckpointException as failure:
        raise_first(failure, group)
    return writer.files


def load_tensors(
    folder: Path,
    tensors: Mapping[str, Holding],
    *,
    prefix: str | None = "",
    group: Group | None = None,
) -> None:
    """Fill tensors and pieces in place, and prove that every element of each came from the files.

    Floating types are converted into each other; no other type is. `prefix`: every stored tensor whose name
    begins so must be among `tensors`; None for taking some tensors and leaving the others.

    With a group, its processes call this together, each with what it holds, under any layout; a stored tensor
    has to be taken by one of them. Each reads its own part from the files, and all raise the same errors.

    Raises:
        RunError: naming every missing, extra, misshaped, mistyped or incompletely stored tensor; nothing
            has been written into any tensor of any process then.
    """
    metadata = decide(group, lambda: read_metadata(folder))
    found = combine(
        group,
        lambda: survey(metadata, tensors),
        lambda surveys: verdict(metadata, surveys, prefix=prefix),
    )
    if found:
        raise RunError(f"{folder} does not fit:\n" + "\n".join(f"  {problem}" for problem in found))
    unfilled = combine(
        group,
        lambda: _read(folder, metadata, tensors),
        lambda parts: sorted({name for part in parts for name in part}),
    )
    if unfilled:
        raise RunError(f"{folder}: not every element was read of {', '.join(unfilled)}")


def _read(folder: Path, metadata: Metadata, tensors: Mapping[str, Holding]) -> list[str]:
    """Fill this process's tensors; return the names of those that did not get all their elements."""
    planner = PiecesLoadPlanner()
    try:
        _load_state_dict(dict(tensors), SafetensorsReader(folder, metadata), no_dist=True, planner=planner)
    except CheckpointException as failure:
        raise_first(failure, None)
    return [name for name, held in tensors.items() if planner.num_written[name] != _num_elements(held)]


def _num_elements(held: Holding) -> int:
    """Return how many elements this process has of a tensor."""
    if isinstance(held, Pieces):
        return sum(piece.tensor.numel() for piece in held.pieces)
    return (held.to_local() if isinstance(held, DTensor) else held).numel()
