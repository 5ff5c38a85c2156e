"""The DCP storage: types and shapes survive, no pickle, any layout reads any other, holes are seen."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed import run_ranks
from tests.train.checkpoints.layouts import whole_group
from train.checkpoints.coverage import problems
from train.checkpoints.metadata import METADATA_FILE
from train.checkpoints.safetensors_file import TYPE_CODES, write_safetensors
from train.checkpoints.storage import load_tensors, save_tensors
from train.errors import RunError

TYPES = list(TYPE_CODES)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bytes: NaN, infinities and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)


def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 113)
        for name, tensor in tensors.items()
    }


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(TYPES)), min_size=1, max_size=6
    ),
    shard_bytes=st.integers(1, 300),
)
def test_every_type_and_shape_survives_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[list[int], torch.dtype]], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("storage")
    tensors = {f"t.{i}": random_tensor(tuple(shape), dtype, i) for i, (shape, dtype) in enumerate(entries)}
    files = save_tensors(folder, tensors, shard_bytes=shard_bytes)
    assert set(files) == {path.name for path in folder.iterdir()}
    for name, record in files.items():
        content = (folder / name).read_bytes()
        assert (record.num_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(folder, loaded)
    assert all(same_bytes(loaded[name], tensors[name]) for name in tensors)


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor((3, 5), dtype) for dtype in TYPES}
    tensors["transposed"] = torch.randn(4, 6).t()
    tensors["scalar"] = torch.tensor(2.5)
    write_safetensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert all(same_bytes(read[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(TypeError, match="wave has type"):
        write_safetensors(tmp_path / "b.safetensors", {"wave": torch.zeros(2, dtype=torch.complex64)})


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickled")

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    save_tensors(tmp_path, {"a": torch.ones(3)})
    load_tensors(tmp_path, {"a": torch.zeros(3)})
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_destinations_may_be_views_and_parameters(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"view": torch.arange(6.0).reshape(2, 3), "parameter": torch.ones(4)})
    flat = torch.full((10,), float("nan"))
    parameter = torch.nn.Parameter(torch.full((4,), float("nan")))
    load_tensors(tmp_path, {"view": flat[2:8].view(3, 2).t(), "parameter": parameter})
    assert flat[2:8].view(3, 2).t().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert flat[:2].isnan().all()
    assert flat[8:].isnan().all()
    assert parameter.tolist() == [1, 1, 1, 1]


def test_every_difference_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    stored = {
        "same": torch.ones(2),
        "shape": torch.ones(2, 3),
        "type": torch.ones(2),
        "surplus": torch.ones(1),
    }
    save_tensors(tmp_path, stored)
    wanted = poisoned(
        {
            "same": torch.ones(2),
            "shape": torch.ones(3, 2),
            "type": torch.ones(2, dtype=torch.int64),
            "absent": torch.ones(7),
        }
    ) | {"nowhere": torch.empty(1, device="meta")}
    with pytest.raises(RunError) as caught:
        load_tensors(tmp_path, wanted)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  absent, shape [7], is missing in the checkpoint",
        "  nowhere, shape [1], is missing in the checkpoint",
        "  shape has shape [2, 3] in the checkpoint, [3, 2] is wanted",
        "  surplus, shape [1], is extra: the checkpoint has it, nothing takes it",
        "  type has type torch.float32 in the checkpoint, which is not converted to torch.int64",
    ]
    assert wanted["same"].isnan().all()


def test_a_meta_destination_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(RunError, match="a has no memory to load into"):
        load_tensors(tmp_path, {"a": torch.empty(2, device="meta")})


def test_floating_types_are_converted_by_rounding(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    save_tensors(tmp_path, {"w": weight})
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        loaded = {"w": torch.full((1000,), float("nan"), dtype=dtype)}
        load_tensors(tmp_path, loaded)
        assert torch.equal(loaded["w"], weight.to(dtype))


def test_a_prefix_limits_what_counts_as_extra(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"model.a": torch.ones(2), "model.b": torch.ones(2), "optim.a": torch.ones(2)})
    loaded = {"model.a": torch.zeros(2)}
    with pytest.raises(RunError, match=r"model\.b.*is extra") as caught:
        load_tensors(tmp_path, loaded, prefix="model.")
    assert "optim" not in str(caught.value)
    load_tensors(tmp_path, loaded, prefix=None)
    assert loaded["model.a"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["hole", "overlap", "outside"])
def test_chunks_that_do_not_tile_are_refused(tmp_path: Path, damage: str) -> None:
    save_tensors(tmp_path, {"a": torch.ones(4, 2)})
    path = tmp_path / METADATA_FILE
    metadata = json.loads(path.read_text())
    chunk = metadata["tensors"]["a"]["chunks"][0]
    if damage == "hole":
        chunk["sizes"] = [3, 2]
    if damage == "overlap":  # as many elements as the tensor has, but some twice
        chunk["sizes"] = [2, 2]
        metadata["tensors"]["a"]["chunks"].append(chunk | {"offsets": [1, 0]})
    if damage == "outside":
        chunk["offsets"] = [1, 0]
    path.write_text(json.dumps(metadata))
    with pytest.raises(RunError, match="a is stored incompletely"):
        load_tensors(tmp_path, {"a": torch.zeros(4, 2)})


@given(
    size=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_tiling_agrees_with_counting_each_element(size: list[int], data: st.DataObject) -> None:
    box = st.tuples(*(st.tuples(st.integers(0, 4), st.integers(0, 4)) for _ in size))
    boxes = data.draw(st.lists(box, max_size=5))
    count = torch.zeros([9] * len(size), dtype=torch.int64)
    for one in boxes:
        count[tuple(slice(start, start + length) for start, length in one)] += 1
    wanted = torch.zeros_like(count)
    wanted[tuple(slice(0, length) for length in size)] = 1
    chunks = [
        ChunkStorageMetadata(torch.Size(start for start, _ in one), torch.Size(length for _, length in one))
        for one in boxes
    ]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)
    found = problems(Metadata({"a": entry}), {"a": torch.empty(size)}, prefix="")
    assert (not found) == torch.equal(count, wanted)


def test_an_unreadable_metadata_file_is_one_error(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(4, 2)})
    for content in ("", "[]", '{"tensors": {"a": {}}}', '{"tensors": {"a": {"dtype": "nonsense"}}}'):
        (tmp_path / METADATA_FILE).write_text(content)
        with pytest.raises(RunError, match="does not describe a checkpoint's tensors"):
            load_tensors(tmp_path, {"a": torch.zeros(4, 2)})


def test_a_shard_that_is_no_safetensors_file_is_one_error(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(4, 2)})
    (tmp_path / "shard-00000-000.safetensors").write_bytes(b"PK" * 40)
    with pytest.raises(RunError, match="cannot be read"):
        load_tensors(tmp_path, {"a": torch.zeros(4, 2)})


# ---- across layouts -------------------------------------------------------------------------------------


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "rows": torch.randn(6, 4, generator=generator),
        "columns": torch.randn(4, 6, generator=generator).bfloat16(),
        "uneven": torch.randn(5, 3, generator=generator),
        "one_row": torch.randn(1, 3, generator=generator),  # the second rank holds nothing of it
        "replicated": torch.randn(3, generator=generator),
        "plain": torch.arange(7),
        "scalar": torch.tensor(9),
    }


SAVED_AS = {
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "uneven": [Shard(0)],
    "one_row": [Shard(0)],
    "replicated": [Replicate()],
}
LOADED_AS = {
    "rows": [Shard(1)],
    "columns": [Shard(0)],
    "uneven": [Shard(1)],
    "one_row": [Replicate()],
    "replicated": [Shard(0)],
}


def two_ranks(rank: int, folder: Path) -> None:
    """Save sharded; load, under other placements, what two ranks and what one process wrote."""
    mesh = init_device_mesh("cpu", (2,))
    whole, group = whole_tensors(), whole_group(rank, 2)

    def lay_out(tensors: dict[str, Tensor], placements: dict[str, Any]) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor.clone()
            for name, tensor in tensors.items()
        }

    if rank == 0:
        (folder / "by-two").mkdir()
    distributed.barrier()
    files = save_tensors(folder / "by-two", lay_out(whole, SAVED_AS), group=group)
    assert bool(files) == (rank == 0)
    for source in ("by-two", "by-one"):
        loaded = lay_out(poisoned(whole), LOADED_AS)
        load_tensors(folder / source, loaded, group=group)
        for name, tensor in loaded.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, whole[name]), (source, name)


def test_two_ranks_and_one_process_read_each_other(tmp_path: Path) -> None:
    whole = whole_tensors()
    (tmp_path / "by-one").mkdir()
    save_tensors(tmp_path / "by-one", whole)
    run_ranks(2, two_ranks, tmp_path)
    stored = json.loads((tmp_path / "by-two" / METADATA_FILE).read_text())["tensors"]
    assert [len(stored[name]["chunks"]) for name in ("rows", "columns", "uneven")] == [2, 2, 2]
    assert {chunk["file"] for chunk in stored["rows"]["chunks"]} == {
        "shard-00000-000.safetensors",
        "shard-00001-000.safetensors",
    }
    loaded = poisoned(whole)
    load_tensors(tmp_path / "by-two", loaded)
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
