"""The process groups of a layout: one world, a dense and an expert view (parallel/layout.py).

Pass the mesh in; there are no module globals. On one process every group has one member and nothing is
initialised.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist

from parallel.groups import Group, Trace
from parallel.layout import Layout, axis_groups, coordinates, end_groups


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Over which processes a gradient is summed: sharded inside `shard`, the same in all of `replicate`."""

    shard: Group
    replicate: Group


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The groups of this process. `sequence` spans cp and tp, `batch` dp and cp."""

    layout: Layout
    rank: int
    trace: Trace
    world: Group
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    ep: Group
    ep_inter: Group
    """The ranks of ep with this one's place in every node."""
    ep_intra: Group
    """The ranks of ep on this node."""
    sequence: Group
    dense: Reduction
    """Weights split over tp: summed over dp and cp."""
    replicated: Reduction
    """Weights that every tp rank holds and applies to its own tokens: summed over dp, cp and tp."""
    expert: Reduction
    """Experts: summed over the processes that hold the same ones."""
    ends: Reduction | None
    """The embedding where first and last pipeline rank hold one each; None in between."""

    @property
    def place(self) -> dict[str, int]:
        """Return this process's coordinates in the dense view."""
        return coordinates(self.layout.dense_axes, self.rank)

    def members(self) -> dict[str, tuple[int, ...]]:
        """Return the global ranks of this process's groups by name, for messages."""
        groups = [getattr(self, each.name) for each in fields(self)]
        groups += [group for r in groups if isinstance(r, Reduction) for group in (r.shard, r.replicate)]
        return {group.name: group.ranks for group in groups if isinstance(group, Group)}

    @property
    def dp_rank(self) -> int:
        """Return this process's place among the data-parallel ranks."""
        return self.place["dp_replicate"] * self.layout.dp_shard + self.place["dp_shard"]


def single_process() -> Mesh:
    """Return the mesh of one process."""
    return build_mesh(Layout(), rank=0)


def build_mesh(layout: Layout, *, rank: int, trace: Trace | None = None) -> Mesh:
    """Create every group of the layout; all processes of the world call this together."""
    trace = trace or Trace()
    maker = _Maker(rank, trace)
    dense, experts = layout.dense_axes, layout.expert_axes
    shard, replicate = ("dp_shard", "cp"), axis_groups(dense, ("dp_replicate",))
    copies = maker.group("dp_replicate", replicate)
    ends = maker.maybe("ends", end_groups(layout))
    return Mesh(
        layout=layout,
        rank=rank,
        trace=trace,
        world=maker.group("world", [list(range(layout.world_size))]),
        pp=maker.group("pp", axis_groups(dense, ("pp",))),
        dp=maker.group("dp", axis_groups(dense, ("dp_replicate", "dp_shard"))),
        cp=maker.group("cp", axis_groups(dense, ("cp",))),
        tp=maker.group("tp", axis_groups(dense, ("tp",))),
        ep=maker.group("ep", axis_groups(experts, ("ep_node", "ep_local"))),
        ep_inter=maker.group("ep_inter", axis_groups(experts, ("ep_node",))),
        ep_intra=maker.group("ep_intra", axis_groups(experts, ("ep_local",))),
        sequence=maker.group("sequence", axis_groups(dense, ("cp", "tp"))),
        dense=Reduction(shard=maker.group("dp_cp", axis_groups(dense, shard)), replicate=copies),
        replicated=Reduction(
            shard=maker.group("dp_cp_tp", axis_groups(dense, (*shard, "tp"))), replicate=copies
        ),
        expert=Reduction(
            shard=maker.group("edp", axis_groups(experts, ("edp_shard",))),
            replicate=maker.group("edp_replicate", axis_groups(experts, ("edp_replicate",))),
        ),
        ends=Reduction(shard=ends, replicate=copies) if ends else None,
    )


class _Maker:
    """Creates groups in one order on every process, each set of ranks once."""

    def __init__(self, rank: int, trace: Trace) -> None:
        self._rank, self._trace = rank, trace
        self._handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def group(self, name: str, families: list[list[int]]) -> Group:
        """Return this process's group among `families`, which partition the world."""
        group = self.maybe(name, families)
        if group is None:
            raise ValueError(f"rank {self._rank} is in none of the groups of {name}")
        return group

    def maybe(self, name: str, families: list[list[int]]) -> Group | None:
        """Return this process's group among `families`, or None."""
        mine: Group | None = None
        for ranks in families:
            handle = self._handle(tuple(ranks))
            if self._rank in ranks:
                mine = Group(name, ranks, rank=ranks.index(self._rank), handle=handle, trace=self._trace)
        return mine

    def _handle(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        if ranks not in self._handles:
            made: Any = dist.new_group(list(ranks))  # a number stands for "not a member"
            self._handles[ranks] = made
        return self._handles[ranks]
