"""A folder of safetensors as DeepSeek publishes weights: what it holds, whether that is right, its tensors.

`check` reads headers only and names every tensor that is missing, unexpected, misshaped or of a type that is
no weight, before a single value is read. FP8 weights (arXiv 2412.19437, section 3.3) carry one FP32 factor
per 128 x 128 elements, `weight_scale_inv`, and are multiplied out on reading.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import WeightsError
from model.hf import HfTensor
from model.kernels.fp8 import BLOCK
from train.hf.encoding import SCALE_SUFFIX

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

WEIGHT_TYPES = ("F32", "BF16", "F16")
FP8_TYPE = "F8_E4M3"


class MtpWeights(StrEnum):
    """What a conversion does with the MTP modules."""

    KEEP = "keep"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass
class HfFolder:
    """The weights of one folder: every tensor by name, and what is wrong with the files themselves."""

    path: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    _open_file: tuple[Path, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> "HfFolder":
        """Read the headers of every shard; WeightsError when the folder has no weights at all."""
        folder = cls(path=path)
        indexed = _indexed_tensors(path)
        files = {name: path / file for name, file in indexed.items()}
        for file in sorted(set(files.values())) or [path / SINGLE_FILE]:
            folder._read_header(file)
        for name, file in files.items():
            stored = folder.tensors.get(name)
            if stored is not None and stored.file != file:
                folder.damage.append(
                    f"misplaced: {name} is in {stored.file.name}, {INDEX_FILE} says {file.name}"
                )
        return folder

    def check(self, expected: Iterable[HfTensor], *, ignored: Callable[[str], bool]) -> None:
        """Raise WeightsError naming all that keeps this folder from being exactly `expected`.

        Copies of shared weights may be absent; names for which `ignored` is true are passed over.
        """
        wanted = {tensor.name: tensor for tensor in expected}
        problems = list(self.damage)
        for name, tensor in wanted.items():
            if name in self.tensors:
                problems += self._problems(tensor)
            elif not tensor.is_copy:
                problems.append(f"missing: {name} {list(tensor.shape)}")
        scales = {name + SCALE_SUFFIX for name in wanted if self._is_fp8(name)}
        problems += [
            f"unexpected: {name} {list(stored.shape)} in {stored.file.name}"
            for name, stored in self.tensors.items()
            if name not in wanted and name not in scales and not ignored(name)
        ]
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise WeightsError(f"{self.path} does not hold the weights of its {CONFIG_FILE}:\n{listed}")

    def read(self, name: str) -> Tensor:
        """Return a tensor in FP32, FP8 blocks multiplied out."""
        tensor = self._read(name)
        if self._is_fp8(name):
            return dequantize_blocks(tensor, self._read(name + SCALE_SUFFIX))
        return tensor.float()

    def _read(self, name: str) -> Tensor:
        file = self.tensors[name].file
        if self._open_file is None or self._open_file[0] != file:
            self._open_file = (file, safe_open(file, framework="pt"))
        return self._open_file[1].get_tensor(name)

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  # a shard is not a mapping
                    part = shard.get_slice(name)
                    if name in self.tensors:
                        self.damage.append(f"twice: {name} in {self.tensors[name].file.name} and {file.name}")
                    self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            self.damage.append(f"missing file: {file.name}")
        except (SafetensorError, OSError) as error:
            self.damage.append(f"unreadable file: {file.name} ({error})")

    def _problems(self, tensor: HfTensor) -> list[str]:
        stored = self.tensors[tensor.name]
        where = f"{tensor.name} in {stored.file.name}"
        if stored.shape != tensor.shape:
            return [f"misshaped: {where} is {list(stored.shape)}, must be {list(tensor.shape)}"]
        if stored.dtype == FP8_TYPE:
            return self._scale_problems(tensor)
        if stored.dtype not in WEIGHT_TYPES:
            return [f"type: {where} is {stored.dtype}, must be one of {', '.join((*WEIGHT_TYPES, FP8_TYPE))}"]
        return []

    def _scale_problems(self, tensor: HfTensor) -> list[str]:
        name = tensor.name + SCALE_SUFFIX
        blocks = tuple(-(-size // BLOCK) for size in tensor.shape)
        if name not in self.tensors:
            return [f"missing: {name} {list(blocks)}, the factors of an FP8 weight"]
        shape = self.tensors[name].shape
        return [] if shape == blocks else [f"misshaped: {name} is {list(shape)}, must be {list(blocks)}"]

    def _is_fp8(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].dtype == FP8_TYPE


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; WeightsError when there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} does not exist; name a folder with {CONFIG_FILE} and safetensors"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return values


def dequantize_blocks(weight_OI: Tensor, scale_PQ: Tensor) -> Tensor:
    """Return weight * scale in FP32 [O, I]; block (p, q) of 128 x 128 elements takes scale[p, q].

    Blocks at the right and lower edge may be partly empty.
    """
    rows, columns = weight_OI.shape
    spread = scale_PQ.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight_OI.to(torch.float32) * spread


def _indexed_tensors(path: Path) -> dict[str, str]:
    """Return the file of each tensor as the index has it; empty for a folder with one file and no index."""
    if not (path / INDEX_FILE).exists():
        if not (path / SINGLE_FILE).exists():
            raise WeightsError(
                f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}; name a folder of safetensors"
            )
        return {}
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path / INDEX_FILE} has no weight_map; download the folder again")
    return weight_map
