"""Ranks and axes are those of a plain array of ranks, reshaped."""

import numpy as np
import pytest

from parallel.layout import Layout, axis_groups, check_axes, coordinates, end_groups, rank_at

LAYOUTS = [
    Layout(),
    Layout(pp=2, dp_shard=2, tp=2, ep=2),
    Layout(pp=2, dp_replicate=2, dp_shard=3, cp=2, tp=2, ep=4),
    Layout(dp_replicate=2, dp_shard=2, cp=2, ep=8, ep_nodes=2),
    Layout(pp=3, dp_shard=4, ep=2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_views_number_the_same_processes(layout):
    assert check_axes(layout)
    for axes in (layout.dense_axes, layout.expert_axes):
        world = np.arange(layout.world_size).reshape(list(axes.values()))
        for rank in range(layout.world_size):
            place = coordinates(axes, rank)
            assert list(place) == list(axes)
            assert world[tuple(place.values())] == rank == rank_at(axes, place)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "along", [("tp",), ("dp_shard", "cp"), ("dp_replicate", "dp_shard"), ("cp", "tp"), ("pp",)]
)
def test_groups_partition_the_world(layout, along):
    axes = layout.dense_axes
    world = np.arange(layout.world_size).reshape(list(axes.values()))
    positions = [list(axes).index(name) for name in along]
    rows = np.moveaxis(world, positions, range(-len(along), 0)).reshape(-1, np.prod([axes[n] for n in along]))
    assert axis_groups(axes, along) == rows.tolist()


def test_tensor_parallel_peers_are_neighbours():
    layout = Layout(pp=2, dp_shard=2, tp=2, ep=2)
    assert axis_groups(layout.dense_axes, ("tp",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_groups(layout.dense_axes, ("dp_shard", "cp")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_groups(layout.dense_axes, ("pp",)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert axis_groups(layout.expert_axes, ("ep_node", "ep_local")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_groups(layout.expert_axes, ("edp_shard",)) == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_shared_inside_one_pipeline_rank(layout):
    for group in axis_groups(layout.expert_axes, ("ep_node", "ep_local")):
        assert len({coordinates(layout.dense_axes, rank)["pp"] for rank in group}) == 1
    assert layout.edp * layout.ep == layout.per_stage


def test_expert_ranks_of_a_node_are_neighbours():
    axes = Layout(dp_shard=8, ep=4, ep_nodes=2).expert_axes
    assert axis_groups(axes, ("ep_local",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_groups(axes, ("ep_node",)) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_experts_have_as_many_copies_as_dense_weights_only_where_these_divide():
    assert Layout(dp_replicate=2, dp_shard=4, ep=2).edp_replicate == 2
    assert Layout(dp_replicate=2, dp_shard=4, ep=8).edp_replicate == 1


def test_the_embedding_is_shared_between_the_ends_of_the_pipeline():
    layout = Layout(pp=3, dp_replicate=2, dp_shard=2, tp=2)
    groups = end_groups(layout)
    assert groups == [[0, 2, 16, 18], [1, 3, 17, 19], [4, 6, 20, 22], [5, 7, 21, 23]]
    for group in groups:
        places = [coordinates(layout.dense_axes, rank) for rank in group]
        assert {place["pp"] for place in places} == {0, 2}
        assert len({(place["dp_replicate"], place["tp"]) for place in places}) == 1
    assert end_groups(Layout(dp_shard=2, tp=2)) == axis_groups(
        Layout(dp_shard=2, tp=2).dense_axes, ("dp_shard", "cp")
    )
