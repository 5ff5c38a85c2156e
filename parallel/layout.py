"""Which process is where: pure integers, no torch, so that plans need neither a device nor a job.

One world, two views. Dense weights see (pp, dp_replicate, dp_shard, cp, tp), the last varying fastest, so
that tensor-parallel peers are neighbours. Experts see (pp, edp, ep): expert parallelism borrows ranks of dp,
cp and tp inside one pipeline rank.
"""

from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of every axis. `dp` data-parallel ranks are `dp_replicate` copies of `dp_shard` shards.

    The `ep` ranks that together hold all experts are spread over `ep_nodes` nodes.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    ep_nodes: int = 1

    @property
    def dp(self) -> int:
        """Return the number of data-parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def per_stage(self) -> int:
        """Return the processes of one pipeline rank."""
        return self.dp * self.cp * self.tp

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.pp * self.per_stage

    @property
    def edp(self) -> int:
        """Return how many processes hold the same experts."""
        return self.per_stage // self.ep

    @property
    def edp_replicate(self) -> int:
        """Return the copies of the experts' optimizer state: those of the dense state where they divide."""
        return self.dp_replicate if self.edp % self.dp_replicate == 0 else 1

    @property
    def dense_axes(self) -> dict[str, int]:
        """Return the axes of the dense view, slowest first."""
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
        }

    @property
    def expert_axes(self) -> dict[str, int]:
        """Return the axes of the experts' view, slowest first."""
        return {
            "pp": self.pp,
            "edp_replicate": self.edp_replicate,
            "edp_shard": self.edp // self.edp_replicate,
            "ep_node": self.ep_nodes,
            "ep_local": self.ep // self.ep_nodes,
        }


def coordinates(axes: dict[str, int], rank: int) -> dict[str, int]:
    """Return the place of `rank` on every axis."""
    place: dict[str, int] = {}
    for name, size in reversed(axes.items()):
        rank, place[name] = divmod(rank, size)
    return {name: place[name] for name in axes}


def rank_at(axes: dict[str, int], place: dict[str, int]) -> int:
    """Return the rank at a place; the inverse of `coordinates`."""
    rank = 0
    for name, size in axes.items():
        rank = rank * size + place[name]
    return rank


def axis_groups(axes: dict[str, int], along: tuple[str, ...]) -> list[list[int]]:
    """Return every group of ranks that differ only on the axes `along`, each in order of these axes."""
    fixed = [name for name in axes if name not in along]
    groups = []
    for outer in product(*(range(axes[name]) for name in fixed)):
        base = dict(zip(fixed, outer, strict=True))
        inner = product(*(range(axes[name]) for name in along))
        groups.append([rank_at(axes, base | dict(zip(along, place, strict=True))) for place in inner])
    return groups


def end_groups(layout: Layout) -> list[list[int]]:
    """Return the groups that share the embedding between the first and the last pipeline rank.

    Each holds the dp_shard and cp ranks of both; with one pipeline rank, or one that holds both ends, they
    are the plain groups over dp_shard and cp. Ranks of the middle are in no group.
    """
    axes = layout.dense_axes
    ends = [0] if layout.pp == 1 else [0, layout.pp - 1]
    groups = []
    for replicate, tp in product(range(layout.dp_replicate), range(layout.tp)):
        places = product(ends, range(layout.dp_shard), range(layout.cp))
        groups.append(
            [
                rank_at(axes, {"pp": pp, "dp_replicate": replicate, "dp_shard": dp, "cp": cp, "tp": tp})
                for pp, dp, cp in places
            ]
        )
    return groups


def check_axes(layout: Layout) -> bool:
    """Return whether both views cover the same processes."""
    return prod(layout.dense_axes.values()) == prod(layout.expert_axes.values()) == layout.world_size
