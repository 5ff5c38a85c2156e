"""The groups of a mesh are those of its layout, and a sum over each reaches exactly its members."""

import torch

from parallel.groups import Group
from parallel.layout import Layout, coordinates
from parallel.mesh import build_mesh, single_process
from tests.distributed import run_ranks

LAYOUTS = [
    Layout(pp=2, dp_shard=2, ep=2),
    Layout(pp=2, tp=2, ep=2),
    Layout(dp_replicate=2, dp_shard=2, ep=2),
    Layout(cp=2, tp=2, ep=4, ep_nodes=2),
]


def groups_of(rank: int) -> list[dict[str, tuple[list[int], float]]]:
    """Return, for each layout, the members of every group of `rank` and the sum of 2^rank over them."""
    found = []
    for layout in LAYOUTS:
        mesh = build_mesh(layout, rank=rank)
        reductions = {
            "dense": mesh.dense,
            "replicated": mesh.replicated,
            "expert": mesh.expert,
            "ends": mesh.ends,
        }
        groups = {
            n: getattr(mesh, n)
            for n in ("world", "pp", "dp", "cp", "tp", "ep", "ep_inter", "ep_intra", "sequence")
        }
        groups |= {f"{n}.shard": r.shard for n, r in reductions.items() if r}
        groups |= {f"{n}.replicate": r.replicate for n, r in reductions.items() if r}
        assert all(group.ranks[group.rank] == rank for group in groups.values())
        found.append({name: (list(group.ranks), _sum(group, rank)) for name, group in groups.items()})
    return found


def _sum(group: Group, rank: int) -> float:
    return group.all_reduce(torch.tensor([2.0**rank])).item()


def test_groups_hold_the_ranks_that_differ_on_their_axes_only():
    everyone = run_ranks(4, groups_of)
    dense = {
        "world": ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
        "pp": ("pp",),
        "dp": ("dp_replicate", "dp_shard"),
        "cp": ("cp",),
        "tp": ("tp",),
        "sequence": ("cp", "tp"),
        "dense.shard": ("dp_shard", "cp"),
        "dense.replicate": ("dp_replicate",),
        "replicated.shard": ("dp_shard", "cp", "tp"),
        "replicated.replicate": ("dp_replicate",),
        "ends.shard": ("pp", "dp_shard", "cp"),  # with two pipeline ranks, both are ends
        "ends.replicate": ("dp_replicate",),
    }
    experts = {
        "ep": ("ep_node", "ep_local"),
        "ep_inter": ("ep_node",),
        "ep_intra": ("ep_local",),
        "expert.shard": ("edp_shard",),
        "expert.replicate": ("edp_replicate",),
    }
    for index, layout in enumerate(LAYOUTS):
        for rank in range(4):
            for name, (ranks, total) in everyone[rank][index].items():
                along = (dense | experts)[name]
                axes = layout.expert_axes if name in experts else layout.dense_axes
                mine = coordinates(axes, rank)
                same = [
                    r
                    for r in range(4)
                    if all(coordinates(axes, r)[a] == mine[a] for a in axes if a not in along)
                ]
                assert ranks == same, (layout, rank, name)
                assert total == sum(2.0**r for r in same), (layout, rank, name)


def test_one_process_needs_no_process_group():
    mesh = single_process()
    assert mesh.world.size == mesh.tp.size == mesh.expert.shard.size == 1
    assert mesh.world.all_reduce(torch.tensor([3.0])).item() == 3.0
    assert mesh.dp_rank == 0
