"""Weights in the layout of DeepSeek's open weights, written shard by shard.

The shards are planned from shapes alone, then each is filled and written on its own: at no time is more in
memory than the source tensors that one shard is cut from, and that shard.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from model.hf import HfTensor
from train.hf.encoding import Encoding
from train.hf.folder import INDEX_FILE

ReadSources = Callable[[Sequence[str]], dict[str, Tensor]]
"""From our names to the tensors, FP32 on the CPU."""


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    file: str
    tensors: list[HfTensor]
    num_bytes: int


def plan_shards(tensors: Sequence[HfTensor], *, encoding: Encoding, shard_bytes: int) -> list[Shard]:
    """Cut the tensors, in order, into files of at most `shard_bytes`; a larger tensor gets its own file.

    The scales of an FP8 weight are in the file of its codes.
    """
    groups: list[list[HfTensor]] = []
    sizes: list[int] = []
    for tensor in tensors:
        size = encoding.num_bytes(tensor)
        if not groups or sizes[-1] + size > shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(tensor)
        sizes[-1] += size
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group, size)
        for i, (group, size) in enumerate(zip(groups, sizes, strict=True), start=1)
    ]


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    *,
    encoding: Encoding,
    read_sources: ReadSources,
    written: Callable[[Shard], None],
) -> None:
    """Write every shard and the index; `written` is called after each. OSError when the disk is full."""
    held: dict[str, Tensor] = {}
    for shard in shards:
        needed = list(dict.fromkeys(tensor.source for tensor in shard.tensors))
        # Stacked experts often end in the next shard: keep what is still needed, read the rest.
        held = {name: tensor for name, tensor in held.items() if name in needed}
        held |= read_sources([name for name in needed if name not in held])
        _save(_fill(shard, held, encoding), folder / shard.file)
        written(shard)
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {
            name: shard.file
            for shard in shards
            for tensor in shard.tensors
            for name in encoding.names(tensor)
        },
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # as the user's umask says; safetensors leaves its files to their owner alone


def _fill(shard: Shard, sources: dict[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """Return what stands in the file of a shard, by name."""
    tensors: dict[str, Tensor] = {}
    for tensor in shard.tensors:
        source = sources[tensor.source]
        tensors |= encoding.encode(tensor, source if tensor.expert is None else source[tensor.expert])
    return tensors
