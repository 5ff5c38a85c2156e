"""Write one safetensors file as a stream: one tensor at a time, its checksum computed on the way.

The library's own writer needs every tensor on the CPU at once and cannot flush; the format is small enough
to write by hand (https://huggingface.co/docs/safetensors): the header's length as 8 little-endian bytes, a
JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes one after another without holes.
Reading is the library's.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoints.durable import FileRecord, HashingFile, durable_file

TYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a new file that `safetensors` reads, durably, and return its record.

    Raises:
        OSError: if it cannot be written.
        TypeError: if a tensor's type has no place in the format.
    """
    # widest elements first, so that every tensor starts at a multiple of its element size
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    with durable_file(path) as file:
        header = json.dumps(_header(ordered), separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in ordered.values():
            _write_bytes(file, tensor)
    return file.record


def _header(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    header: dict[str, dict[str, object]] = {}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPE_CODES:
            raise TypeError(f"{name} has type {tensor.dtype}, which safetensors cannot store")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": TYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    return header


def _write_bytes(file: HashingFile, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)
