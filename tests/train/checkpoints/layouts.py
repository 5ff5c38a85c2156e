"""Tensors as a ZeRO-1 engine holds them under a layout: uneven boxes and intervals, poisoned surroundings.

The cuts are computed here once more from the layout's coordinates; nothing of the engine takes part.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from parallel.groups import Group
from parallel.layout import Layout, coordinates
from parallel.pieces import Holding, Pieces, pieces_of

MARGIN = 5
"""Poisoned elements before and behind each interval: a load must leave them alone."""

SPLIT = {"embed": "rows", "wo": "columns", "experts": "experts", "norm": "whole", "late": "rows"}


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "embed": torch.randn(11, 4, generator=generator),  # on the first pipeline rank
        "wo": torch.randn(6, 10, generator=generator).bfloat16(),
        "experts": torch.randn(6, 3, 5, generator=generator),
        "norm": torch.randn(7, generator=generator),
        "late": torch.randn(5, 3, generator=generator),  # on the last pipeline rank
        "bias": torch.randn(6, generator=generator),  # whole on every process
        "count": torch.tensor(12),
    }


def whole_group(rank: int, size: int) -> Group:
    """The world as tests/distributed.py starts it."""
    return Group("world", range(size), rank=rank, handle=torch.distributed.group.WORLD)


def cut(length: int, parts: int, part: int) -> tuple[int, int]:
    """Uneven on purpose; the first parts of a short length are empty."""
    return length * part**2 // parts**2, length * (part + 1) ** 2 // parts**2


@dataclass(frozen=True)
class Owned:
    """What a rank owns of a tensor: a poisoned buffer, and the values that belong into its middle."""

    buffer: Tensor
    pieces: Pieces
    values: Tensor

    @property
    def interval(self) -> Tensor:
        return self.buffer[MARGIN : MARGIN + self.values.numel()]

    def is_exact(self, factor: int) -> bool:
        margins = torch.cat([self.buffer[:MARGIN], self.buffer[MARGIN + self.values.numel() :]])
        return torch.equal(self.interval, self.values * factor) and bool(margins.isnan().all())


def own(name: str, whole: Tensor, layout: Layout, rank: int) -> Owned | None:
    """What `rank` owns of a tensor, poisoned; None where its pipeline rank has nothing of it."""
    dense = coordinates(layout.dense_axes, rank)
    if dense["pp"] != {"embed": 0, "late": layout.pp - 1}.get(name, dense["pp"]):
        return None
    shards = layout.dp_shard * layout.cp, dense["dp_shard"] * layout.cp + dense["cp"]
    box = [(0, size) for size in whole.shape]
    match SPLIT[name]:
        case "rows":
            box[0] = cut(whole.shape[0], layout.tp, dense["tp"])
        case "columns":
            box[1] = cut(whole.shape[1], layout.tp, dense["tp"])
        case "experts":
            box[0] = cut(whole.shape[0], layout.ep, rank % layout.ep)
            edp_shard = layout.edp // layout.edp_replicate
            shards = edp_shard, rank // layout.ep % edp_shard
        case _:
            shards = shards[0] * layout.tp, shards[1] * layout.tp + dense["tp"]
    shape = [stop - start for start, stop in box]
    start, stop = cut(prod(shape), *shards)
    buffer = torch.full((2 * MARGIN + stop - start,), float("nan"), dtype=whole.dtype)
    pieces = pieces_of(
        buffer[MARGIN : MARGIN + stop - start],
        start=start,
        local_shape=shape,
        origin=[first for first, _ in box],
        global_shape=whole.shape,
    )
    local = whole[tuple(slice(*ends) for ends in box)]
    return Owned(buffer, pieces, local.reshape(-1)[start:stop])


@dataclass(frozen=True)
class Share:
    """All that one rank has under a layout; replicated tensors are its own copies."""

    owned: dict[str, Owned]
    plain: dict[str, Tensor]

    def tensors(self) -> dict[str, Holding]:
        return self.plain | {name: owned.pieces for name, owned in self.owned.items()}

    def fill(self, factor: int = 1) -> "Share":
        for owned in self.owned.values():
            owned.interval.copy_(owned.values * factor)
        for name, tensor in self.plain.items():
            tensor.copy_(whole_tensors()[name] * factor)
        return self

    def wrong(self, factor: int = 1) -> list[str]:
        """Names of what is not bit for bit the rank's part of the whole, times a factor."""
        whole = {name: tensor * factor for name, tensor in whole_tensors().items()}
        plain = [name for name, tensor in self.plain.items() if not torch.equal(tensor, whole[name])]
        return plain + [name for name, owned in self.owned.items() if not owned.is_exact(factor)]

    def is_poisoned(self) -> bool:
        return all(bool(owned.buffer.isnan().all()) for owned in self.owned.values())


def poisoned_share(layout: Layout, rank: int) -> Share:
    whole = whole_tensors()
    owned = {name: own(name, whole[name], layout, rank) for name in SPLIT}
    return Share(
        owned={name: one for name, one in owned.items() if one},
        plain={name: torch.full_like(tensor, -1) for name, tensor in whole.items() if name not in SPLIT},
    )
