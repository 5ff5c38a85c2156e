"""Many processes, each with intervals of its own boxes, write one checkpoint and read any other."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from parallel.layout import Layout
from parallel.pieces import Pieces, boxes_of_interval, pieces_of
from tests.distributed import run_ranks
from tests.train.checkpoints.layouts import poisoned_share, whole_group, whole_tensors
from train.checkpoints.coverage import is_tiled
from train.checkpoints.metadata import read_metadata
from train.checkpoints.storage import load_tensors, save_tensors
from train.errors import RunError

OF_FOUR = {
    "pipeline": Layout(pp=2, tp=2, ep=2),
    "copies": Layout(dp_replicate=2, dp_shard=2, ep=2),
    "context": Layout(dp_shard=2, cp=2, ep=4),
    "mixed": Layout(dp_shard=2, tp=2, ep=2),
}
OF_TWO = (Layout(tp=2, ep=2), Layout(dp_shard=2), Layout(pp=2), Layout(dp_replicate=2))


def error_of(action: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def save_by_four(rank: int, folder: Path) -> list[str]:
    group = whole_group(rank, 4)
    for name, layout in OF_FOUR.items():
        if rank == 0:
            (folder / name).mkdir()
        distributed.barrier()
        share = poisoned_share(layout, rank).fill()
        files = save_tensors(folder / name, share.tensors(), group=group)
        assert bool(files) == (rank == 0)
    if rank == 0:
        (folder / "refused").mkdir()
    distributed.barrier()

    def save(tensors: dict[str, Tensor]) -> str:
        return error_of(lambda: save_tensors(folder / "refused", tensors, group=group), ValueError)

    def rows(start: int, stop: int) -> dict[str, Tensor]:
        flat = torch.zeros(stop - start)
        origin = (start, 0)
        return {
            "a": pieces_of(flat, start=0, local_shape=(stop - start, 1), origin=origin, global_shape=(8, 1))
        }

    lines = [
        save({"b": torch.zeros(2, dtype=torch.float16 if rank == 2 else torch.float32)}),
        save(rows(2 * rank, 2 * rank + (1 if rank == 3 else 2))),  # a hole
        save(rows(max(0, 2 * rank - 1), 2 * rank + 2)),  # overlaps
    ]
    assert [path.name for path in (folder / "refused").iterdir()] == []
    return lines


def load_by_two(rank: int, folder: Path) -> list[str]:
    group = whole_group(rank, 2)
    for source in (*OF_FOUR, "one"):
        for layout in OF_TWO:
            share = poisoned_share(layout, rank)
            load_tensors(folder / source, share.tensors(), group=group)
            assert share.wrong() == [], (source, layout)
    hold_nothing(rank, folder)
    return [
        load_what_does_not_fit(rank, folder / "mixed"),
        load_a_bad_file(rank, folder),
        evaluate(rank, folder),
    ]


def load_what_does_not_fit(rank: int, folder: Path) -> str:
    """Every rank hears of the problems of each, and of what none takes; nobody's tensors are touched."""
    share = poisoned_share(Layout(pp=2), rank)
    wanted = share.tensors()
    wanted.pop("late", None)  # now nobody takes it; `embed` is still taken by one rank alone
    if rank == 1:
        wanted["absent"] = torch.zeros(2)
        wanted["norm"] = pieces_of(torch.zeros(3), start=0, local_shape=(3,), origin=(0,), global_shape=(8,))
    message = error_of(lambda: load_tensors(folder, wanted, group=whole_group(rank, 2)), RunError)
    assert share.is_poisoned()
    return message


def load_a_bad_file(rank: int, folder: Path) -> str:
    """Only one rank reads the file that is missing; both hear of it."""
    share = poisoned_share(Layout(dp_shard=2), rank)
    tensors = share.tensors()
    return error_of(lambda: load_tensors(folder / "torn", tensors, group=whole_group(rank, 2)), RunError)


def hold_nothing(rank: int, folder: Path) -> None:
    """A process may have nothing to write or to read: no entry, or no piece of what another has whole."""
    group = whole_group(rank, 2)
    if rank == 0:
        (folder / "sparse").mkdir()
    distributed.barrier()
    nothing = Pieces(torch.Size([3]), torch.float32, ())
    given = {"a": torch.ones(3), "b": nothing} if rank == 1 else {"b": torch.ones(3)}
    save_tensors(folder / "sparse", given, group=group)
    taken = {"a": torch.zeros(3), "b": torch.zeros(3)} if rank == 0 else {"b": nothing}
    load_tensors(folder / "sparse", taken, group=group)
    assert [held.tolist() for held in taken.values() if held is not nothing] == [[1, 1, 1]] * (2 - 2 * rank)


def evaluate(rank: int, folder: Path) -> str:
    """One process loads a whole model while the other waits for it."""
    if rank == 0:
        loaded = {name: torch.full_like(tensor, -1) for name, tensor in whole_tensors().items()}
        load_tensors(folder / "pipeline", loaded)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in whole_tensors().items())
        (folder / "alone").mkdir()
        save_tensors(folder / "alone", loaded)
    distributed.barrier()
    return "evaluated"


def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    whole = whole_tensors()
    contradiction, hole, overlap = (
        set(lines) for lines in zip(*run_ranks(4, save_by_four, tmp_path), strict=True)
    )
    assert contradiction == {"no checkpoint can be written:\n  b has not one shape and type on all ranks"}
    refused = "no checkpoint can be written:\n  a: what the ranks hold does not tile its shape [8, 1]"
    assert hole == overlap == {refused}
    for name in OF_FOUR:
        metadata = read_metadata(tmp_path / name)
        assert metadata.state_dict_metadata.keys() == whole.keys()
        writers = {place.file.split("-")[1] for place in metadata.storage_data.values()}
        assert writers == {"00000", "00001", "00002", "00003"}, "copies are spread over those who hold them"
        loaded = {name: torch.full_like(tensor, -1) for name, tensor in whole.items()}
        load_tensors(tmp_path / name, loaded)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in whole.items())
    (tmp_path / "one").mkdir()
    save_tensors(tmp_path / "one", whole)
    (tmp_path / "torn").mkdir()
    for path in (tmp_path / "mixed").iterdir():
        if path.name != "shard-00003-000.safetensors":
            (tmp_path / "torn" / path.name).write_bytes(path.read_bytes())
    misfit, torn, _ = zip(*run_ranks(2, load_by_two, tmp_path), strict=True)
    assert misfit[0] == misfit[1]
    assert misfit[0].splitlines()[1:] == [
        "  absent, shape [2], is missing in the checkpoint",
        "  late, shape [5, 3], is extra: the checkpoint has it, nothing takes it",
        "  norm has shape [7] in the checkpoint, [8] is wanted",
    ]
    assert torn[0] == torn[1]
    assert "cannot be read: No such file" in torn[0]
    assert "shard-00003-000.safetensors" in torn[0]


def test_thousands_of_chunks_are_checked_at_once() -> None:
    """As of 2,048 ranks; comparing all pairs would take minutes."""
    shape, ranks = (16, 48, 24), 2048
    cuts = [rank * 16 * 48 * 24 // ranks for rank in range(ranks + 1)]
    chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for start, stop in pairwise(cuts)
        for offsets, sizes in boxes_of_interval(shape, start, stop)
    ]
    assert len(chunks) > ranks

    def tiled(chunks: list[ChunkStorageMetadata]) -> bool:
        return is_tiled(TensorStorageMetadata(TensorProperties(), torch.Size(shape), chunks))

    assert tiled(chunks)
    assert not tiled(chunks[1:])
    assert not tiled([*chunks, chunks[-1]])
    assert not tiled([*chunks[1:], chunks[-1]])
