"""What one process owns of a tensor: boxes of the global tensor, as views of the process's own memory.

A process holds a box of a parameter (rows, columns or whole experts of it). The optimizer engine lays such
boxes row by row into flat buffers and gives each process a contiguous range of a buffer, so what is owned of
one parameter is an interval of the box's elements in row-major order. A checkpoint speaks of axis-aligned
boxes of the global tensor. An interval is a few of them; elements [2, 17) of a 5 x 4 box are three:

    . . a a
    b b b b      a: offsets (0, 2), sizes (1, 2)
    b b b b      b: offsets (1, 0), sizes (3, 4)
    b b b b      c: offsets (4, 0), sizes (1, 1)
    c . . .

Each of these boxes is contiguous in the flat buffer, so a `Piece` is a view: a checkpoint is written from the
optimizer's own memory and read straight into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a global tensor: where it begins there, and its values, in the box's shape."""

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a process owns of a tensor of this shape and type: disjoint pieces, or none at all."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


Holding = Tensor | Pieces
"""What a process has of a tensor: all of it, or pieces."""


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes_of_interval(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Return the elements [start, stop) of a row-major tensor as boxes, in this order.

    They are the fewest boxes that are contiguous in memory, at most 2 * len(shape) - 1 (a tensor without
    dimensions is one).
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    end, rest = divmod(stop, row)
    if first == end:
        return _in_row(first, boxes_of_interval(shape[1:], skipped, rest))
    boxes: list[Box] = []
    if skipped:
        boxes += _in_row(first, boxes_of_interval(shape[1:], skipped, row))
        first += 1
    if first < end:
        boxes.append(((first, *(0 for _ in shape[1:])), (end - first, *shape[1:])))
    return boxes + _in_row(end, boxes_of_interval(shape[1:], 0, rest))


def pieces_of(
    flat: Tensor,
    *,
    start: int,
    local_shape: Sequence[int],
    origin: Sequence[int],
    global_shape: Sequence[int],
) -> Pieces:
    """Return an interval of a box's elements as pieces of the global tensor; each aliases `flat`.

    Args:
        flat: 1-D and contiguous, the box's elements [start, start + len(flat)) in row-major order.
        start: place of the first one among the box's elements.
        local_shape: the box's sizes.
        origin: the box's offsets in the global tensor.
        global_shape: the global tensor's shape.

    Raises:
        ValueError: if the interval is not inside the box, or the box not inside the global tensor.
    """
    stop = start + flat.numel()
    ends = [offset + size for offset, size in zip(origin, local_shape, strict=True)]
    inside = all(a >= 0 and b <= size for a, b, size in zip(origin, ends, global_shape, strict=True))
    if not inside or not 0 <= start <= stop <= prod(local_shape):
        raise ValueError(
            f"elements [{start}, {stop}) of a box of {list(local_shape)} at {list(origin)} "
            f"are not in a tensor of {list(global_shape)}"
        )
    pieces: list[Piece] = []
    position = 0
    for offsets, sizes in boxes_of_interval(local_shape, start, stop):
        values = flat[position : position + prod(sizes)].view(sizes)
        there = tuple(a + b for a, b in zip(origin, offsets, strict=True))
        pieces.append(Piece(there, values))
        position += prod(sizes)
    return Pieces(torch.Size(global_shape), flat.dtype, tuple(pieces))


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    """Return boxes of one row as boxes of the tensor that the row is in."""
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes]
