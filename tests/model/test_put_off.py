"""The closed form of what waits for weight gradients against what is alive once all others are there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.activations import FP8_TILE, Spread, saved_bytes_per_token
from model.config import Compute, Gemm, ModelConfig, PrecisionConfig, Recompute
from model.cost import element_bytes
from model.fp8 import Fp8Policy, install_fp8
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.grouped_gemm import WINDOW_MULTIPLE
from model.put_off import microbatch_put_off_bytes
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, Work, install
from tests.model.live_bytes import LiveBytes
from tests.model.oracle import randomize
from tests.model.small import small
from tests.model.test_activations import WIDTHS, coded_weights

B, S = 2, 128
SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "V3's": lambda: small(**WIDTHS, num_heads=4, num_mtp_layers=1),
    "two depths": lambda: small(**WIDTHS, num_layers=2, num_mtp_layers=2, top_k=3),
    "plain queries": lambda: small(**WIDTHS | {"q_lora_rank": None}, num_shared_experts=2),
    "routed experts alone": lambda: small(**WIDTHS, num_shared_experts=0, num_dense_layers=0),
    "dense": lambda: small(**WIDTHS, num_layers=2, num_dense_layers=2, num_heads=6),
    "dropout": lambda: small(**WIDTHS, dropout=0.1),
}


def measure(config: ModelConfig, recompute: Recompute, compute: Compute, gemm: Gemm) -> int:
    """Return the bytes that wait after a backward pass, until the products are run.

    Without codes of weights, and without the rows that fill up those of experts.
    """
    model, weight_gradients = Transformer(config, recompute=recompute, compute=compute), WeightGradients()
    randomize(model, seed=0)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape)
    made_before: list[Tensor] = []
    if gemm is not Gemm.compute:
        policy = Fp8Policy(PrecisionConfig(gemm=gemm))
        install_fp8(model, policy, weight_gradients)
        step(model, weight_gradients)
        codes = [policy.weights.codes(w, power_of_two=False) for w in coded_weights(model)]
        made_before = [tensor for code in codes for tensor in (code.codes, code.scales)]
    install(model, weight_gradients)
    with LiveBytes() as live:
        load_LE, work = step(model, weight_gradients)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live.forget(load_LE, *made_before, *model.parameters(), *gradients, *model.buffers())
    waiting = live.num_bytes
    for product in work:
        product()
    assert live.num_bytes == 0
    return waiting - sum(
        filling(counts, config, compute, coded=gemm is not Gemm.compute) for counts in load_LE.tolist()
    )


def step(model: Transformer, weight_gradients: WeightGradients) -> tuple[Tensor, list[Work]]:
    """Return the rows of each expert, and what was put off in the backward pass of one microbatch."""
    generator = torch.Generator().manual_seed(0)
    depths = 1 + len(model.mtp)
    tokens_BKS = torch.randint(64, (B, depths, S), generator=generator)
    labels_T = torch.randint(64, (depths * B * S,), generator=generator)
    output = model(tokens_BKS, torch.arange(S).expand(B, -1), balance_scale=0.5)
    hidden_TD = torch.cat(output.hidden_KBSD).flatten(0, 1)
    loss, _ = linear_cross_entropy(hidden_TD, model.head.weight, labels_T, torch.ones(depths * B * S))
    with weight_gradients.put_off() as work:
        loss.backward()
    return output.load_LE, work


def filling(counts: list[int], config: ModelConfig, compute: Compute, *, coded: bool) -> int:
    """Return the bytes of rows that fill up those of a layer's experts, and of copies of its last windows."""
    hidden, width = config.hidden_size, config.moe.intermediate_size
    if coded:
        rows = sum(-count % FP8_TILE for count in counts)
        tiles = -(-hidden // FP8_TILE)
        return rows * (hidden + 4 * tiles) + round(rows * (hidden + 3 * width) * (1 + 4 / FP8_TILE))
    element, num_rows, start, numbers = element_bytes(compute), sum(counts), 0, 0
    for count in counts:
        window = count + -count % WINDOW_MULTIPLE
        numbers += 3 * width * (window - count)
        numbers += 2 * hidden * window if count and start + window > num_rows else 0
        start += count
    return element * numbers


@pytest.mark.parametrize("gemm", [Gemm.compute, Gemm.fp8_reference])
@pytest.mark.parametrize(
    ("shape", "compute"), [*((shape, Compute.bf16) for shape in SHAPES), ("V3's", Compute.fp32)]
)
def test_the_closed_form_is_what_waits(shape: str, compute: Compute, gemm: Gemm) -> None:
    """Within 0.1 %, whatever is recomputed."""
    config = SHAPES[shape]()
    predicted = microbatch_put_off_bytes(
        config,
        layers=range(config.num_layers),
        last=True,
        tokens=B * S,
        compute=compute,
        gemm=gemm,
        spread=Spread(experts=0),
    )
    for recompute in Recompute:
        assert predicted == pytest.approx(measure(config, recompute, compute, gemm), rel=0.001), recompute


def test_parts_of_a_model_add_up() -> None:
    config = small(**WIDTHS, num_mtp_layers=1)
    how = {"compute": Compute.bf16, "gemm": Gemm.fp8_reference, "spread": Spread(experts=0)}

    def part(layers: range, *, last: bool = False) -> int:
        return microbatch_put_off_bytes(config, layers=layers, last=last, tokens=100, **how)

    assert part(range(0)) == 0
    assert part(range(2)) + part(range(2, 3), last=True) == pytest.approx(part(range(3), last=True), abs=1)
    assert sum(part(range(i, i + 1)) for i in range(3)) == pytest.approx(part(range(3)), abs=2)
    joint = 3 * 2 * config.hidden_size
    assert part(range(0), last=True) == pytest.approx(part(range(2, 3)) + 100 * joint, abs=1)


def test_rows_of_experts_are_filled_up() -> None:
    """In the compute type SwiGLU output and the gradients of gate and up to 64 rows, all codes to 128."""
    config = small(**WIDTHS)
    hidden, width = config.hidden_size, config.moe.intermediate_size

    def part(gemm: Gemm, experts: int) -> int:
        how = {"compute": Compute.bf16, "gemm": gemm, "spread": Spread(experts=experts)}
        return microbatch_put_off_bytes(config, layers=[0, 1], last=False, tokens=100, **how)

    row = hidden + 2 * 4 + (3 * width + hidden) * (1 + 4 / 128)
    for gemm, of_expert in ((Gemm.compute, 31.5 * 2 * 3 * width), (Gemm.fp8_reference, 63.5 * row)):
        assert part(gemm, 3) - part(gemm, 0) == pytest.approx(3 * of_expert, abs=1)


def test_more_waits_than_the_forward_pass_of_deepseek_v3_left() -> None:
    """Inputs are back that were recomputed, and the gradients of outputs are new."""
    for gemm, least, most in ((Gemm.compute, 3.8, 4.0), (Gemm.fp8_reference, 3.1, 3.3)):
        how = {"compute": Compute.bf16, "gemm": gemm, "spread": Spread(experts=0)}
        saved = saved_bytes_per_token(ModelConfig(), layer=3, recompute=Recompute.deepseek, **how)
        waits = microbatch_put_off_bytes(ModelConfig(), layers=[3], last=False, tokens=4096, **how)
        assert least < waits / (4096 * saved) < most
