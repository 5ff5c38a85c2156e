"""How tensors lie in a checkpoint's files: cut at the size asked for, under plain names, and checked."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoints.safetensors_file import write_safetensors
from train.checkpoints.storage import load_tensors, save_tensors
from train.errors import RunError


def test_files_are_cut_at_the_size_asked_for_and_hold_tensors_by_name(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    save_tensors(tmp_path, tensors, shard_bytes=120)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"shard-00000-{number:03d}.safetensors" for number in range(3)]
    held = [load_file(path) for path in files]
    assert [len(of_file) for of_file in held] == [3, 3, 1]
    found = {name: tensor for of_file in held for name, tensor in of_file.items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_smaller_than_the_metadata_says_is_refused_and_not_spread(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(6, 2)})
    shard = tmp_path / "shard-00000-000.safetensors"
    shard.unlink()
    write_safetensors(shard, {"a": torch.ones(1, 2)})
    with pytest.raises(RunError, match=r"a has another shape than metadata\.json says"):
        load_tensors(tmp_path, {"a": torch.zeros(6, 2)})
