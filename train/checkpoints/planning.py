"""Who writes and who reads which box of which tensor: DCP's planners, which here also understand `Pieces`.

DCP asks every process for its write or read items, each a box of a global tensor, and a writer or reader
then resolves an item to memory. Tensors and DTensors are planned by DCP itself; `Pieces` become one item for
each piece when written and, when read, one item for each stored chunk that meets a piece.

Writing is planned together: a box that several processes give, such as a router bias, is written by the one
that has the least to write. Reading needs no plan of others: each process reads what it holds.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from io import BytesIO

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import (
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.pieces import Holding, Piece, Pieces
from train.checkpoints.coverage import is_tiled


class PiecesSavePlanner(DefaultSavePlanner):
    """Plans the writing of tensors, DTensors and pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return an item for each box that this process could write."""
        plain = create_default_local_save_plan(_without_pieces(self.state_dict), self.is_coordinator)
        items = [item for name, held in self.state_dict.items() for item in _write_items(name, held)]
        return SavePlan([*plain.items, *items])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Choose one writer for each box.

        Raises:
            ValueError: if two processes disagree about a tensor's shape or type, or if the boxes of all
                processes do not tile a tensor: a checkpoint that could not be loaded is never written.
        """
        self.global_plan, self.metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        wrong = sorted({*_contradicted(all_plans, self.metadata), *_untiled(self.metadata)})
        if wrong:
            raise ValueError("no checkpoint can be written:\n" + "\n".join(f"  {line}" for line in wrong))
        return self.global_plan, self.metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """Return the values of an item of this process."""
        held = self.state_dict[write_item.index.fqn]
        if not isinstance(held, Pieces):
            return super().resolve_data(write_item)
        return next(piece.tensor for piece in held.pieces if piece.offsets == write_item.index.offset)


class PiecesLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of tensors, DTensors and pieces; counts the elements written into each."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.num_written: Counter[str] = Counter()

    def set_up_planner(
        self,
        state_dict: dict[str, Holding],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the destinations as they are; they have memory already."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return an item for each pair of a destination's box and a stored chunk that meet."""
        if self.metadata is None:
            raise ValueError("there is no metadata to plan with")
        plain = create_default_local_load_plan(_without_pieces(self.state_dict), self.metadata)
        stored = self.metadata.state_dict_metadata
        items = [item for name, held in self.state_dict.items() for item in _read_items(name, held, stored)]
        return LoadPlan([*plain.items, *items])

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of a destination's memory that an item fills."""
        held = self.state_dict[read_item.dest_index.fqn]
        if not isinstance(held, Pieces):
            return super().resolve_tensor(read_item)
        piece = held.pieces[read_item.dest_index.index or 0]
        return narrow_tensor_by_index(piece.tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count one part that has arrived."""
        self.num_written[read_item.dest_index.fqn] += tensor.numel()


def _without_pieces(tensors: Mapping[str, Holding]) -> dict[str, Holding]:
    return {name: held for name, held in tensors.items() if not isinstance(held, Pieces)}


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=piece.tensor.shape)


def _write_items(name: str, held: Holding) -> Iterator[WriteItem]:
    for piece in held.pieces if isinstance(held, Pieces) else ():
        data = TensorWriteData(
            chunk=_chunk(piece), properties=TensorProperties(dtype=held.dtype), size=held.shape
        )
        yield WriteItem(MetadataIndex(name, piece.offsets), WriteItemType.SHARD, tensor_data=data)


def _read_items(name: str, held: Holding, stored: Mapping[str, object]) -> list[ReadItem]:
    entry = stored[name]
    if not isinstance(held, Pieces) or not isinstance(entry, TensorStorageMetadata):
        return []
    return create_read_items_for_chunk_list(name, entry, [_chunk(piece) for piece in held.pieces])


def _contradicted(plans: list[SavePlan], metadata: Metadata) -> Iterator[str]:
    for plan in plans:
        for item in plan.items:
            name, entry = item.index.fqn, metadata.state_dict_metadata[item.index.fqn]
            data = item.tensor_data
            if data is None or not isinstance(entry, TensorStorageMetadata):
                continue
            if (data.size, data.properties.dtype) != (entry.size, entry.properties.dtype):
                yield f"{name} has not one shape and type on all ranks"


def _untiled(metadata: Metadata) -> Iterator[str]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not is_tiled(entry):
            yield f"{name}: what the ranks hold does not tile its shape {list(entry.size)}"
