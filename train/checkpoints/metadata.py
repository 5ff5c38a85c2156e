"""metadata.json of a checkpoint: DCP's metadata in plain JSON, and where each chunk is stored.

{"tensors": {name: {"dtype", "shape", "chunks": [{"offsets", "sizes", "file", "key"}]}}}. A tensor has one
chunk for each rank that held a different part of it; together the chunks tile its shape.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from train.errors import RunError

METADATA_FILE = "metadata.json"


@dataclass(frozen=True, kw_only=True)
class ChunkPlace:
    """Where a chunk is stored."""

    file: str
    key: str


def metadata_text(metadata: Metadata, places: Mapping[MetadataIndex, ChunkPlace]) -> str:
    """Return the content of metadata.json. TypeError for what is not a tensor."""
    entries: dict[str, Any] = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(tensor, TensorStorageMetadata):
            raise TypeError(f"{name} is not a tensor; progress.json takes everything else")
        entries[name] = {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "shape": list(tensor.size),
            "chunks": [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": places[MetadataIndex(name, chunk.offsets)].file,
                    "key": places[MetadataIndex(name, chunk.offsets)].key,
                }
                for chunk in tensor.chunks
            ],
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    return f'{{"tensors": {{\n{lines}\n}}}}\n'


def types_and_shapes(metadata: Metadata) -> dict[str, str]:
    """Return, by name, what a tensor is in words, such as bfloat16[64, 3]."""
    return {
        name: f"{str(entry.properties.dtype).removeprefix('torch.')}{list(entry.size)}"
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_metadata(folder: Path) -> Metadata:
    """Read metadata.json back into what DCP plans with. RunError when it is absent or not such a file."""
    path = folder / METADATA_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        tensors = {name: _tensor_metadata(entry) for name, entry in stored.items()}
        places = {
            MetadataIndex(name, chunk["offsets"]): ChunkPlace(file=Path(chunk["file"]).name, key=chunk["key"])
            for name, entry in stored.items()
            for chunk in entry["chunks"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} does not describe a checkpoint's tensors: {error!r}") from error
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _tensor_metadata(entry: dict[str, Any]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, entry["dtype"])),
        size=torch.Size(entry["shape"]),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(chunk["offsets"]), sizes=torch.Size(chunk["sizes"]))
            for chunk in entry["chunks"]
        ],
    )
