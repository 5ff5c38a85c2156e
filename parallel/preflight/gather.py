"""Everybody's findings, for everybody: any JSON value of each process, in rank order.

Two all-gathers of bytes. The first says how long each value is, so that the second can have rows of one
length, which a collective needs; what a short value leaves of its row is zeros and is cut off again.
"""

import json
from typing import Any

import torch

from parallel.groups import Group


def gather_json(value: Any, group: Group) -> list[Any]:
    """Return the `value` of every process of the group, by its place there; all of them call this together.

    Values are what `json.dumps` accepts. They travel as CPU tensors. Raises TypeError for anything else.
    """
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = group.all_gather(torch.tensor([mine.numel()]))
    row = mine.new_zeros(1, int(lengths.max()))
    row[0, : mine.numel()] = mine
    rows = group.all_gather(row)
    pairs = zip(rows, lengths.tolist(), strict=True)
    return [json.loads(row[:length].numpy().tobytes()) for row, length in pairs]
