"""Layers are cut as an exhaustive search would cut them."""

from itertools import combinations_with_replacement, pairwise

import pytest

from model.config import ModelConfig
from model.cost import flops_per_token, layer_flops_per_token
from parallel.config import ParallelConfig, Schedule
from parallel.placement import (
    assign_layers,
    count_stages,
    rank_of_stage,
    stages_on_rank,
    tail_flops_per_token,
)
from tests.model.small import small

MODELS = {
    "small": small(num_layers=7),
    "one depth": small(num_layers=7, num_dense_layers=2, num_mtp_layers=1),
    "heavy head": small(num_layers=6, vocab_size=1024, num_mtp_layers=1),
    "heavy dense layers": small(num_layers=8, num_dense_layers=4, dense_intermediate_size=512),
}


def stage_costs(config: ModelConfig, seq_len: int, placed: list[range]) -> list[int]:
    costs = [sum(layer_flops_per_token(config, layer, seq_len) for layer in layers) for layers in placed]
    costs[-1] += tail_flops_per_token(config, seq_len)
    return costs


def best_by_search(config: ModelConfig, seq_len: int, num_stages: int) -> list[range]:
    """Try every cut; the earlier stages' sizes are the last criterion."""
    options = []
    for inner in combinations_with_replacement(range(config.num_layers + 1), num_stages - 1):
        cuts = [0, *inner, config.num_layers]
        placed = [range(a, b) for a, b in pairwise(cuts)]
        if all(len(layers) > 0 for layers in placed[1:-1]):
            costs = stage_costs(config, seq_len, placed)
            options.append((max(costs), sum(cost**2 for cost in costs), inner, placed))
    return min(options)[3]


@pytest.mark.parametrize("seq_len", [8, 4096])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_the_cut_is_the_best_of_all(config, num_stages, seq_len):
    assert assign_layers(config, seq_len, num_stages) == best_by_search(config, seq_len, num_stages)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_stages_cost_together_what_the_model_costs(config):
    placed = assign_layers(config, 64, 4)
    assert [layer for layers in placed for layer in layers] == list(range(config.num_layers))
    assert sum(stage_costs(config, 64, placed)) == flops_per_token(config, 64)


def test_of_cuts_that_cost_the_same_the_one_with_fewer_layers_in_front_is_taken():
    config = small(num_layers=7, num_dense_layers=0)
    assert [len(layers) for layers in assign_layers(config, 64, 3)] == [2, 3, 2]  # not 3, 2, 2


def test_deepseek_v3_in_two_stages_on_each_of_16_ranks():
    """The last stage has nothing but the head, used twice, and the MTP module: as much as four layers."""
    counts = [len(layers) for layers in assign_layers(ModelConfig(), 4096, 32)]
    assert sum(counts) == 61
    assert counts[-1] == 0
    assert sorted(counts[:-1]) == [1] + 30 * [2]
    assert [len(layers) for layers in assign_layers(ModelConfig(), 4096, 16)] == [4] * 15 + [1]


def test_only_the_ends_may_be_without_layers():
    config = small(num_layers=2)
    assert [len(layers) for layers in assign_layers(config, 8, 4)] == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="2 layers are too few for 5 stages"):
        assign_layers(config, 8, 5)


def test_a_placement_by_hand_is_taken_as_it_is():
    config = small(num_layers=7)
    assert assign_layers(config, 8, 3, layers_per_stage=[0, 6, 1]) == [range(0), range(6), range(6, 7)]


@pytest.mark.parametrize("by_hand", [[3, 4], [3, 0, 4], [3, 3, 2], [-1, 4, 4]])
def test_a_placement_by_hand_must_cover_the_model(by_hand):
    with pytest.raises(ValueError, match="does not cut 7 layers into 3 stages"):
        assign_layers(small(num_layers=7), 8, 3, layers_per_stage=by_hand)


@pytest.mark.parametrize(
    ("schedule", "on_first", "on_last"),
    [
        ("gpipe", [0], [3]),
        ("1f1b", [0], [3]),
        ("interleaved", [0, 4, 8], [3, 7, 11]),
        ("interleaved_zb", [0, 4, 8], [3, 7, 11]),
        ("zbv", [0, 7], [3, 4]),
        ("dualpipev", [0, 7], [3, 4]),
    ],
)
def test_stages_lie_in_loops_or_in_a_v(schedule, on_first, on_last):
    kind = Schedule(schedule)
    assert stages_on_rank(kind, 4, 3, 0) == on_first
    assert stages_on_rank(kind, 4, 3, 3) == on_last
    stages = [stage for rank in range(4) for stage in stages_on_rank(kind, 4, 3, rank)]
    assert sorted(stages) == list(range(count_stages(ParallelConfig(pp=4, schedule=kind, chunks=3))))
    for rank in range(4):
        assert all(rank_of_stage(kind, 4, 3, stage) == rank for stage in stages_on_rank(kind, 4, 3, rank))


def test_one_pipeline_rank_has_one_stage():
    for schedule in Schedule:
        assert count_stages(ParallelConfig(schedule=schedule)) == 1
        assert stages_on_rank(schedule, 1, 2, 0) == [0]
        assert rank_of_stage(schedule, 1, 2, 0) == 0
