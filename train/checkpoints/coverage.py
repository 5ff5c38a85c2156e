"""Does a checkpoint hold exactly what is asked of it? Decided from metadata alone, before anything is read.

A tensor that keeps some of its initial values after a load trains on without an error, so every destination
must be covered by stored chunks: names equal, shapes equal, types convertible, and the chunks of each tensor
inside its shape, disjoint, and as many elements together as the tensor has. That is a tiling.
"""

from collections.abc import Iterator, Mapping
from math import prod

from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata


def problems(metadata: Metadata, tensors: Mapping[str, Tensor], *, prefix: str | None) -> list[str]:
    """Return one line for each missing, extra, misshaped, mistyped or incompletely stored tensor.

    prefix: stored names that begin so must be asked for; None allows any stored tensor to be left out.
    """
    stored = metadata.state_dict_metadata
    found = [
        f"{name}, shape {list(tensor.shape)}, is missing in the checkpoint"
        for name, tensor in tensors.items()
        if name not in stored
    ]
    for name, entry in stored.items():
        if not isinstance(entry, TensorStorageMetadata):
            found.append(f"{name} is not a tensor")
        elif name in tensors:
            found += _differences(name, entry, tensors[name])
        elif prefix is not None and name.startswith(prefix):
            found.append(
                f"{name}, shape {list(entry.size)}, is extra: the checkpoint has it, nothing takes it"
            )
    return found


def _differences(name: str, entry: TensorStorageMetadata, tensor: Tensor) -> Iterator[str]:
    dtype = entry.properties.dtype
    if tensor.is_meta:
        yield f"{name} has no memory to load into (it is on the meta device)"
    if entry.size != tensor.shape:
        yield f"{name} has shape {list(entry.size)} in the checkpoint, {list(tensor.shape)} is wanted"
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        yield f"{name} has type {dtype} in the checkpoint, which is not converted to {tensor.dtype}"
    if not _tiles(entry):
        yield f"{name} is stored incompletely: its {len(entry.chunks)} chunks do not tile {list(entry.size)}"


def _tiles(entry: TensorStorageMetadata) -> bool:
    chunks = sorted((chunk for chunk in entry.chunks if prod(chunk.sizes)), key=lambda chunk: chunk.offsets)
    inside = all(
        start >= 0 and start + length <= size
        for chunk in chunks
        for start, length, size in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    disjoint = not any(
        _overlap(one, other) for position, one in enumerate(chunks) for other in chunks[position + 1 :]
    )
    return inside and disjoint and sum(prod(chunk.sizes) for chunk in chunks) == prod(entry.size)


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        a < b + num_b and b < a + num_a
        for a, num_a, b, num_b in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
