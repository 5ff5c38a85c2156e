"""Storage for torch.distributed.checkpoint (DCP) without pickle: safetensors for data, JSON for metadata.

DCP's own file storage pickles metadata and data, and its Hugging Face storage has to guess a tensor's shape
from the parts it finds; hence this one. A folder holds shard-RRRRR-FFF.safetensors (rank R, file F) and
metadata.json, which gives, for each tensor, type, shape, and per chunk offsets, sizes, file, key.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from train.checkpoints.durable import FileRecord, write_durably
from train.checkpoints.metadata import METADATA_FILE, ChunkPlace, metadata_text
from train.checkpoints.safetensors_file import write_safetensors
from train.errors import RunError

SHARD_BYTES = 4 << 30
"""A rank's tensors are cut into files of about this size, so that several can be verified at once."""


@dataclass(frozen=True, kw_only=True)
class WrittenChunk:
    """What the process that wrote a chunk tells the one that writes the metadata."""

    place: ChunkPlace
    file: FileRecord


class SafetensorsWriter(StorageWriter):
    """Writes each rank's part into files of its own; then the first rank's `files` has all."""

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self.files: dict[str, FileRecord] = {}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the names of its files."""
        return [replace(plan, storage_data=f"shard-{rank:05d}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks. Raises OSError."""
        results: list[WriteResult] = []
        for number, items in enumerate(self._by_file(plan.items)):
            file = f"{plan.storage_data}-{number:03d}.safetensors"
            chunks = {_key(item): _values(planner, item) for item in items}
            record = write_safetensors(self._folder / file, chunks)
            results += [
                WriteResult(
                    index=item.index,
                    size_in_bytes=chunks[_key(item)].nbytes,
                    storage_data=WrittenChunk(place=ChunkPlace(file=file, key=_key(item)), file=record),
                )
                for item in items
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write metadata.json, on the coordinator alone, after every rank has written. Raises OSError."""
        written = [result for of_rank in results for result in of_rank]
        places = {result.index: result.storage_data.place for result in written}
        self.files = {result.storage_data.place.file: result.storage_data.file for result in written}
        text = metadata_text(metadata, places)
        self.files[METADATA_FILE] = write_durably(self._folder / METADATA_FILE, text)

    def _by_file(self, items: list[WriteItem]) -> list[list[WriteItem]]:
        files: list[list[WriteItem]] = []
        room = 0
        for item in items:
            size = _num_bytes(item)
            if not files or size > room:
                files.append([])
                room = self._shard_bytes
            files[-1].append(item)
            room -= size
        return files

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing outlives one checkpoint: a writer is made for each."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: whoever owns the folder has made it."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave DCP's plan as it is."""
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return False: DCP is never to choose this storage by itself."""
        return False


class SafetensorsReader(StorageReader):
    """Reads parts of chunks through safetensors, which maps files and copies only what is asked."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder = folder
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata this reader was made with."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned part into its destination, converted to its type. RunError for a bad file."""
        by_file: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            place = self._metadata.storage_data[item.storage_index]
            by_file.setdefault(place.file, []).append((place.key, item))
        for file, parts in by_file.items():
            self._read_file(file, parts, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, file: str, parts: list[tuple[str, ReadItem]], planner: LoadPlanner) -> None:
        try:
            with safe_open(self._folder / file, framework="pt") as shard:
                for key, item in parts:
                    box = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    source = shard.get_slice(key)[box] if box else shard.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    if source.shape != target.shape:  # copy_ would broadcast
                        raise RunError(f"{file}: {key} has another shape than {METADATA_FILE} says")
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self._folder} cannot be read: {error}") from error

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing outlives one checkpoint: a reader is made for each."""

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave DCP's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave DCP's plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return False: DCP is never to choose this storage by itself."""
        return False


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return prod(data.chunk.sizes) * data.properties.dtype.itemsize if data else 0


def _key(item: WriteItem) -> str:
    """Name a chunk in its file: the tensor's name, with the box in brackets unless it is the whole tensor."""
    data = item.tensor_data
    if data is None or data.chunk.sizes == data.size:
        return item.index.fqn
    box = ",".join(f"{a}:{a + n}" for a, n in zip(data.chunk.offsets, data.chunk.sizes, strict=True))
    return f"{item.index.fqn}[{box}]"


def _values(planner: SavePlanner, item: WriteItem) -> Tensor:
    values = planner.resolve_data(item)
    if not isinstance(values, Tensor):
        raise TypeError(f"{item.index.fqn} is not a tensor; only tensors go here")
    return values
