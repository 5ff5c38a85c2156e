"""An interval of a row-major box as boxes of the global tensor: exact, few, and without a copy."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pieces import boxes_of_interval, pieces_of


def test_the_example_of_the_module() -> None:
    assert boxes_of_interval((5, 4), 2, 17) == [((0, 2), (1, 2)), ((1, 0), (3, 4)), ((4, 0), (1, 1))]


def test_a_tensor_without_dimensions_is_one_box() -> None:
    assert boxes_of_interval((), 0, 1) == [((), ())]
    assert boxes_of_interval((), 0, 0) == []
    assert boxes_of_interval((0, 3), 0, 0) == []


@st.composite
def intervals(draw: st.DrawFn, *, max_dims: int = 4) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=max_dims)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(intervals())
@settings(max_examples=300, deadline=None)
def test_boxes_tile_the_interval_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(prod(shape)).view(shape)
    boxes = boxes_of_interval(shape, start, stop)
    met: list[int] = []
    for offsets, sizes in boxes:
        assert len(offsets) == len(sizes) == len(shape)
        box = numbers[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
        assert tuple(box.shape) == sizes
        met += box.reshape(-1).tolist()
    assert met == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def is_a_box(places: list[tuple[int, ...]]) -> bool:
    spans = [max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)]
    return prod(spans) == len(places)


def fewest_contiguous_boxes(shape: tuple[int, ...], start: int, stop: int) -> int:
    """By trying every way to cut the interval into runs that are boxes."""
    places = list(product(*map(range, shape)))
    fewest = {start: 0}
    for end in range(start + 1, stop + 1):
        fewest[end] = 1 + min(fewest[cut] for cut in range(start, end) if is_a_box(places[cut:end]))
    return fewest[stop]


@given(intervals(max_dims=3))
@settings(max_examples=150, deadline=None)
def test_no_other_cut_has_fewer_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    assert len(boxes_of_interval(*case)) == fewest_contiguous_boxes(*case)


@given(intervals(), st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_global_elements_and_alias_the_flat_memory(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    local_shape, start, stop = case
    origin = [data.draw(st.integers(0, 3)) for _ in local_shape]
    global_shape = [a + n + data.draw(st.integers(0, 2)) for a, n in zip(origin, local_shape, strict=True)]
    whole = torch.arange(prod(global_shape)).view(global_shape)
    local = whole[tuple(slice(a, a + n) for a, n in zip(origin, local_shape, strict=True))]
    buffer = torch.full((stop - start + 10,), -1)  # the interval lies somewhere in a larger buffer
    flat = buffer[7 : 7 + stop - start]
    held = pieces_of(flat, start=start, local_shape=local_shape, origin=origin, global_shape=global_shape)
    assert (held.shape, held.dtype) == (torch.Size(global_shape), torch.int64)
    for piece in held.pieces:
        there = tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.tensor.shape, strict=True))
        piece.tensor.copy_(whole[there])
    assert torch.equal(flat, local.reshape(-1)[start:stop])
    assert (buffer[:7] == -1).all()
    assert (buffer[7 + stop - start :] == -1).all()


@pytest.mark.parametrize(("start", "origin"), [(-1, (0, 0)), (5, (0, 0)), (0, (3, 0)), (0, (0, -1))], ids=str)
def test_what_lies_outside_is_refused(start: int, origin: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="are not in a tensor"):
        pieces_of(torch.zeros(2), start=start, local_shape=(2, 3), origin=origin, global_shape=(4, 3))
