import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.fake_run import LAYERS, fake_results
from train.logs.metrics import StepResult, load_statistics, peak_memory_gib, step_record


def record_of(result: StepResult, **changes: object) -> dict:
    arguments = {"layer_names": LAYERS, "flops_per_token": 6e6, "peak_tflops": 2.0, "histogram": False}
    return step_record(result, **(arguments | changes))


@pytest.fixture
def result() -> StepResult:
    return next(fake_results(np.random.default_rng(0)))


def test_even_load_has_no_violation_and_full_entropy():
    statistics = load_statistics(torch.full((3, 8), 17))
    assert statistics.max_vio == pytest.approx([0, 0, 0], abs=1e-15)
    assert statistics.entropy == pytest.approx([1, 1, 1], abs=1e-15)
    assert statistics.dead == [0, 0, 0]


def test_everything_on_one_expert_is_the_other_extreme():
    load = torch.zeros(1, 8, dtype=torch.int64)
    load[0, 5] = 2**40
    statistics = load_statistics(load)
    assert statistics.max_vio == [7.0]
    assert statistics.entropy == [0.0]
    assert statistics.dead == [7]


def test_known_loads():
    # Mean 4: the busiest has 8, so MaxVio = 8/4 - 1; entropy of (1/2, 1/4, 1/4, 0) is 1.5 bits of 2.
    statistics = load_statistics(torch.tensor([[8, 4, 4, 0]]))
    assert statistics.max_vio == [1.0]
    assert statistics.entropy == pytest.approx([0.75])
    assert statistics.dead == [1]


def test_a_layer_of_one_expert_is_even():
    statistics = load_statistics(torch.tensor([[9]]))
    assert (statistics.max_vio, statistics.entropy) == ([0.0], [1.0])


def test_a_layer_without_tokens_is_not_a_number():
    statistics = load_statistics(torch.zeros(1, 4, dtype=torch.int64))
    assert math.isnan(statistics.max_vio[0])
    assert math.isnan(statistics.entropy[0])
    assert statistics.dead == [4]


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40).filter(any))
def test_statistics_equal_their_definitions(loads: list[int]):
    statistics = load_statistics(torch.tensor([loads]))
    total = sum(loads)
    entropy = -sum(n / total * math.log(n / total) for n in loads if n) / math.log(len(loads))
    assert statistics.max_vio[0] == pytest.approx(max(loads) * len(loads) / total - 1, abs=1e-12)
    assert statistics.entropy[0] == pytest.approx(entropy, abs=1e-12)
    assert 0 <= statistics.entropy[0] <= 1
    assert statistics.dead == [loads.count(0)]


def test_record_has_a_value_per_layer_and_counts_only_on_request(result: StepResult):
    record = record_of(result)
    for name in ("max_vio", "load_entropy", "bias_range", "dead_experts"):
        assert list(record[name]) == LAYERS
    assert "load" not in record
    assert "loss_scale" not in record
    assert record_of(result, histogram=True)["load"] == dict(
        zip(LAYERS, result.load_LE.tolist(), strict=True)
    )
    spread = (result.bias_LE.max(dim=1).values - result.bias_LE.min(dim=1).values).tolist()
    assert list(record["bias_range"].values()) == spread


def test_speed_is_of_the_whole_step(result: StepResult):
    timing = record_of(result, num_devices=4)["timing"]
    rate = result.batch_size * result.seq_len / result.seconds
    assert timing["tokens_per_second"] == pytest.approx(rate)
    assert timing["flops_per_second"] == pytest.approx(rate * 6e6)
    assert timing["mfu"] == pytest.approx(rate * 6e6 / 8e12)
    assert record_of(result, peak_tflops=None)["timing"]["mfu"] is None


def test_all_that_may_differ_between_equal_runs_is_under_timing(result: StepResult):
    slower = dataclasses.replace(result, seconds=result.seconds * 3)
    first, second = record_of(result), record_of(slower)
    assert first.pop("timing") != second.pop("timing")
    assert first == second


def test_a_dense_model_has_no_routers(result: StepResult):
    empty = {"load_LE": torch.zeros(0, 0, dtype=torch.int64), "bias_LE": torch.zeros(0, 0)}
    record = record_of(dataclasses.replace(result, **empty), layer_names=[], histogram=True)
    for name in ("max_vio", "load_entropy", "bias_range", "dead_experts", "load"):
        assert record[name] == {}


def test_layer_names_must_match_the_loads(result: StepResult):
    with pytest.raises(ValueError, match="zip"):
        record_of(result, layer_names=LAYERS[:-1])


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_gib()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert before < peak_memory_gib() + 1e-9
    assert 0.01 < peak_memory_gib() < 64
    del block
