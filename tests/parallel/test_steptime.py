"""Step times and traffic of whole layouts against sums by hand."""

from dataclasses import replace

import pytest

from model.config import Gemm, PrecisionConfig
from parallel.config import Dispatcher, ParallelConfig, Schedule
from parallel.links import Bytes, ring
from parallel.planner import Plan
from tests.parallel.planned import CARD, MODEL, task

HIDDEN, MOE_BLOCKS = MODEL.hidden_size, 6  # five layers and the MTP module


def test_one_pipeline_rank_does_its_microbatches_one_after_the_other():
    plan = Plan(task(), ParallelConfig(ep=2))
    (times,) = plan.stages.times
    one = times.forward + times.backward_input + times.backward_weight
    one += times.exchange_forward + times.exchange_backward
    assert plan.full_step.pipeline == pytest.approx(4 * one)
    assert plan.full_step.bubble == 0
    assert plan.full_step.seconds > plan.full_step.pipeline


def test_exchanged_bytes_are_rows_there_and_back():
    plan = Plan(task(), ParallelConfig(ep=2))
    rows = MODEL.moe.top_k / 2  # half of them stay
    each = 64 * rows * 2 * HIDDEN * 2  # tokens, there and back, two bytes
    passes = 2 * 4 * MOE_BLOCKS  # forwards and backwards of four microbatches
    assert plan.full_step.experts.intra == pytest.approx(each * passes)
    assert plan.full_step.experts.inter == 0


def test_codes_travel_at_half_the_bytes():
    fp8 = task(precision=PrecisionConfig(gemm=Gemm.fp8_reference))
    layout = ParallelConfig(ep=8, dispatcher=Dispatcher.two_hop, node_size=4)
    plain, coded = (Plan(each, layout).stages.blocks.exchange for each in (task(), fp8))
    assert coded.inter / plain.inter == pytest.approx((1 + 1 / HIDDEN + 2) / 4)
    assert coded.intra / plain.intra == pytest.approx((1 + 1 / HIDDEN + 2) / 4)


def test_gradients_and_weights_travel_once_a_step():
    plan = Plan(task(), ParallelConfig())
    held = plan.state[0]
    gradients = held.gradients // 4
    sent = plan.full_step.data_parallel
    # over two nodes of four: each device hands on a part of what the node has, in FP32 and then in BF16
    assert sent.intra == pytest.approx((4 + 2) * gradients * 7 / 8, rel=0.02)
    assert sent.inter == pytest.approx((4 + 2) * gradients * 1 / 8, rel=0.02)


def test_a_ring_crosses_to_other_nodes_once():
    assert ring(1.0, members=1, stride=1, cluster=CARD) == Bytes()
    assert ring(1.0, members=4, stride=1, cluster=CARD) == Bytes(intra=3)
    assert ring(1.0, members=8, stride=1, cluster=CARD) == Bytes(inter=1, intra=7)
    assert ring(1.0, members=2, stride=4, cluster=CARD) == Bytes(inter=1, intra=1)


def test_joined_passes_hide_their_exchange():
    """Where exchanges take as long as computation, hiding them saves almost half; ZBV waits for every one."""
    layout = {"pp": 2, "ep": 4, "layers_per_stage": [2, 2, 2, 0]}
    times = Plan(task(), ParallelConfig(schedule=Schedule.zbv, **layout)).stages.times[1]
    computed = times.forward + times.backward_input + times.backward_weight
    ratio = (times.exchange_forward + times.exchange_backward) / computed
    slow = task(cluster=replace(CARD, intra_node_gb_s=10.0 * ratio), batch_sizes=(128,))
    joined, apart = (
        Plan(slow, ParallelConfig(schedule=Schedule(name), **layout)) for name in ("dualpipev", "zbv")
    )
    assert joined.full_step.pipeline < 0.75 * apart.full_step.pipeline
    half = slow.on(replace(slow.cluster, communication_share=0.5, intra_node_gb_s=1e6))
    free = slow.on(replace(slow.cluster, intra_node_gb_s=1e6))
    slowed, plain = (Plan(each, joined.parallel).full_step.pipeline for each in (half, free))
    assert 1.5 < slowed / plain < 2


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "interleaved_zb", "zbv", "dualpipev"])
def test_a_rough_step_is_close(schedule):
    plan = Plan(task(batch_sizes=(256,)), ParallelConfig(pp=2, ep=2, schedule=Schedule(schedule)))
    rough, exact = (plan.step(256, rough=rough).seconds for rough in (True, False))
    assert rough == pytest.approx(exact, rel=0.02)


def test_figures_follow_from_the_step():
    plan = Plan(task(), ParallelConfig(pp=2, ep=2))
    speed = 32 * 64 / plan.full_step.seconds / 8
    assert plan.tokens_per_second == pytest.approx(speed)
    assert plan.gpu_hours_per_trillion_tokens == pytest.approx(1e12 / speed / 3600)
