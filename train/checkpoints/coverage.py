"""Does a checkpoint hold exactly what is asked of it? Decided from metadata alone, before anything is read.

A tensor that keeps some of its initial values after a load trains on without an error, so every destination
must be covered by stored chunks: names equal, shapes equal, types convertible, and the chunks of each tensor
a tiling of its shape.

Processes that load together each survey what they hold; what none of them takes is known only of all surveys.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.pieces import Holding, Pieces


@dataclass(frozen=True)
class Survey:
    """What one process asks of a checkpoint, and a line for each of its tensors that the checkpoint fails."""

    names: list[str]
    problems: list[str]


def survey(metadata: Metadata, tensors: Mapping[str, Holding]) -> Survey:
    """Compare what this process holds, with a tensor's global shape, to what is stored."""
    found: list[str] = []
    for name, held in tensors.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None:
            found.append(f"{name}, shape {list(held.shape)}, is missing in the checkpoint")
        elif not isinstance(entry, TensorStorageMetadata):
            found.append(f"{name} is not a tensor")
        else:
            found += _differences(name, entry, held)
    return Survey(names=list(tensors), problems=found)


def verdict(metadata: Metadata, surveys: Sequence[Survey], *, prefix: str | None) -> list[str]:
    """Return one line for each problem of any process, and for each stored tensor that no process takes.

    prefix: stored names that begin so must be asked for; None allows any stored tensor to be left out.
    """
    found = {problem for one in surveys for problem in one.problems}
    taken = {name for one in surveys for name in one.names}
    for name, entry in metadata.state_dict_metadata.items():
        if prefix is not None and name.startswith(prefix) and name not in taken:
            shape = f", shape {list(entry.size)}," if isinstance(entry, TensorStorageMetadata) else ""
            found.add(f"{name}{shape} is extra: the checkpoint has it, nothing takes it")
    return sorted(found)


def problems(metadata: Metadata, tensors: Mapping[str, Holding], *, prefix: str | None) -> list[str]:
    """Return one line for each missing, extra, misshaped, mistyped or incompletely stored tensor.

    For a process that loads alone; `prefix` as of `verdict`.
    """
    return verdict(metadata, [survey(metadata, tensors)], prefix=prefix)


def is_tiled(entry: TensorStorageMetadata) -> bool:
    """Return whether the stored chunks cover each element of a tensor exactly once; O(chunks), exact.

    Add up the chunks' indicator functions; they tile the tensor if and only if the sum is the tensor's own
    indicator function. Two functions with finite support are equal if and only if their mixed differences are
    (differencing along every axis is undone by summing along every axis). The mixed difference of a box is
    zero but at its corners: +1 or -1, as an even or odd number of the corner's coordinates are upper ends.
    """
    if any(size < 0 for chunk in entry.chunks for size in chunk.sizes):
        return False
    difference: Counter[tuple[int, ...]] = Counter()
    for chunk in entry.chunks:
        for corner, sign in _corners(chunk.offsets, chunk.sizes):
            difference[corner] += sign
    for corner, sign in _corners([0] * len(entry.size), entry.size):
        difference[corner] -= sign
    return not any(difference.values())


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    for upper in product((0, 1), repeat=len(offsets)):
        corner = tuple(a + end * n for a, n, end in zip(offsets, sizes, upper, strict=True))
        yield corner, -1 if sum(upper) % 2 else 1


def _differences(name: str, entry: TensorStorageMetadata, held: Holding) -> Iterator[str]:
    dtype = entry.properties.dtype
    memory = [piece.tensor for piece in held.pieces] if isinstance(held, Pieces) else [held]
    if any(tensor.is_meta for tensor in memory):
        yield f"{name} has no memory to load into (it is on the meta device)"
    if entry.size != held.shape:
        yield f"{name} has shape {list(entry.size)} in the checkpoint, {list(held.shape)} is wanted"
    if dtype != held.dtype and not (dtype.is_floating_point and held.dtype.is_floating_point):
        yield f"{name} has type {dtype} in the checkpoint, which is not converted to {held.dtype}"
    if not is_tiled(entry):
        yield f"{name} is stored incompletely: its {len(entry.chunks)} chunks do not tile {list(entry.size)}"
