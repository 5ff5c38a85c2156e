"""Times of blocks: FLOPs are those of model/cost.py, and an operation takes the longer of two times."""

from dataclasses import fields, replace

import pytest

from model.config import Compute, Gemm, ModelConfig, PrecisionConfig, Recompute
from model.cost import flops_per_token
from parallel.config import Context, ParallelConfig
from parallel.rates import Rates, missing, rates_of
from parallel.stage_costs import Blocks
from parallel.work import ATTENTION_BACKWARD, PassTimes, Product, Setting, product_times
from tests.parallel.planned import CARD, MODEL

# One FLOP a second; attention's backward pass at 2.5 / 2, so that it is two forward ones as in model/cost.py
FLOPS = Rates(
    block=1,
    plain=1,
    attention_forward=1,
    attention_backward=ATTENTION_BACKWARD / 2,
    memory=float("inf"),
    intra=float("inf"),
    inter=float("inf"),
)
SEQ_LEN = 32


def setting(rates: Rates = FLOPS, model: ModelConfig = MODEL, **layout: object) -> Setting:
    return Setting(
        model=model,
        parallel=ParallelConfig(**layout),  # type: ignore[arg-type]
        precision=PrecisionConfig(),
        seq_len=SEQ_LEN,
        rates=rates,
    )


def whole_model(one: Setting) -> PassTimes:
    m = one.model
    blocks = Blocks.of(one, CARD)
    heads = 1 + m.num_mtp_layers
    moe = m.num_layers - m.num_dense_layers
    return blocks.stage(dense=m.num_dense_layers, moe=moe, mtp=m.num_mtp_layers, heads=heads)


def total(times: PassTimes) -> float:
    return times.forward + times.backward_input + times.backward_weight


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, num_mtp_layers=0), ModelConfig()])
@pytest.mark.parametrize(("size", "tp", "ep"), [(1, 1, 1), (3, 1, 1), (2, 2, 2), (1, 4, 4)])
def test_flops_are_those_of_the_model(model, size, tp, ep):
    """Every device does its share, whatever is split over tp and ep."""
    times = whole_model(setting(model=model, microbatch_size=size, tp=tp, ep=ep))
    assert total(times) * tp == pytest.approx(flops_per_token(model, SEQ_LEN) * size * SEQ_LEN, rel=1e-12)


def test_every_rank_of_a_sequence_expands_its_memory():
    """With cp, the only work done more than once is the up-projection of keys and values."""
    one, two = (total(whole_model(setting(cp=cp))) for cp in (1, 2))
    a = MODEL.attention
    expansion = 3 * 2 * a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim) * SEQ_LEN
    assert two - one / 2 == pytest.approx((MODEL.num_layers + 1) * expansion / 2)
    exchanged = total(whole_model(setting(cp=2, context=Context.ulysses)))
    assert exchanged == pytest.approx(one / 2)


def test_recomputation_adds_what_it_repeats():
    times = {mode: whole_model(setting(recompute=mode)) for mode in Recompute}
    none, full = times[Recompute.none], times[Recompute.full]
    assert none.forward == full.forward
    assert none.backward_weight == full.backward_weight
    heads = (1 + MODEL.num_mtp_layers) * 6 * MODEL.vocab_size * MODEL.hidden_size * SEQ_LEN
    assert full.backward_input - none.backward_input == pytest.approx(none.forward - heads)
    order = [times[mode].backward_input for mode in Recompute]
    assert order == sorted(order)
    assert len(set(order)) == 4


def test_an_operation_takes_the_longer_of_its_times():
    rates = replace(FLOPS, memory=1.0)
    product = Product(rows=2, inputs=3, outputs=5)
    times = product_times(setting(rates), product)
    assert times.forward == max(2 * 2 * 3 * 5, 2 * (2 * 3 + 3 * 5 + 2 * 5))  # two bytes an element
    assert times.backward_weight == max(60, 2 * (2 * 3 + 2 * 5) + 8 * 15)  # an FP32 sum, read and written
    fast = product_times(setting(replace(rates, plain=1e9, block=1e9)), product)
    assert fast.forward == 2 * (2 * 3 + 3 * 5 + 2 * 5)


def test_fp8_multiplies_faster_but_quantises():
    precision = PrecisionConfig(gemm=Gemm.fp8_reference)
    plain = setting(rates_of(CARD, PrecisionConfig()))
    fp8 = replace(plain, precision=precision, rates=rates_of(CARD, precision))
    big = Product(rows=1e6, inputs=1e4, outputs=1e4)
    assert product_times(fp8, big).forward == pytest.approx(product_times(plain, big).forward / 2, rel=0.05)
    outside = replace(big, in_block=False)
    assert product_times(fp8, outside) == product_times(plain, outside)


def test_imbalance_slows_experts_only():
    even, uneven = (whole_model(replace(setting(ep=2), imbalance=x)) for x in (1.0, 1.5))
    moe = MODEL.moe
    routed = 2 * 3 * MODEL.hidden_size * moe.intermediate_size * moe.top_k * SEQ_LEN
    assert uneven.forward - even.forward == pytest.approx(0.5 * routed * (MODEL.num_layers - 1 + 1))


def test_what_is_not_known_of_a_card_is_named():
    bare = replace(CARD, peak_fp8_tflops=None, memory_gb_s=None)
    found = missing(bare, PrecisionConfig(gemm=Gemm.fp8_reference))
    assert [line.split("=")[0] for line in found] == ["cluster.memory_gb_s", "cluster.peak_fp8_tflops"]
    with pytest.raises(ValueError, match="precision=bf16"):
        rates_of(bare, PrecisionConfig(gemm=Gemm.fp8_reference))
    assert rates_of(CARD, PrecisionConfig(compute=Compute.fp32)).plain == 0.5e12


def test_times_add_up_field_by_field():
    one = PassTimes(**{field.name: i + 1.0 for i, field in enumerate(fields(PassTimes))})
    assert one + one == one * 2
