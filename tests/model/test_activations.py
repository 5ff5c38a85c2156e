"""The closed form of saved activations against what the graph holds, and what FP8 saves of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.activations import (
    EXPERT_ROWS,
    FP8_TILE,
    Spread,
    microbatch_saved_bytes,
    mtp_saved_bytes_per_token,
    saved_bytes_per_token,
)
from model.config import Compute, Gemm, ModelConfig, PrecisionConfig, Recompute
from model.cost import element_bytes
from model.fp8 import Fp8Policy, install_fp8
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.fp8 import BLOCK
from model.kernels.grouped_gemm import WINDOW_MULTIPLE
from model.transformer import Transformer
from tests.model.live_bytes import LiveBytes
from tests.model.oracle import randomize
from tests.model.small import small

B, S = 2, 96
WIDTHS: dict[str, object] = {
    "hidden_size": 160,
    "dense_intermediate_size": 272,
    "intermediate_size": 140,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_experts": 4,
    "num_groups": 2,
}
SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "V3's": lambda: small(**WIDTHS, num_heads=4, num_mtp_layers=1),
    "two depths": lambda: small(**WIDTHS, num_layers=2, num_mtp_layers=2, top_k=3),
    "plain queries": lambda: small(**WIDTHS | {"q_lora_rank": None}, num_shared_experts=2, num_mtp_layers=0),
    "routed experts alone": lambda: small(
        **WIDTHS, num_shared_experts=0, num_dense_layers=0, normalize_weights=False
    ),
    "dense": lambda: small(**WIDTHS, num_layers=2, num_dense_layers=2, num_heads=6),
    "dropout": lambda: small(**WIDTHS, dropout=0.1),
}


def measure(config: ModelConfig, recompute: Recompute, compute: Compute, gemm: Gemm) -> int:
    """Return the bytes that the graph of a microbatch's loss holds.

    Without codes of weights, and without the rows that fill up those of experts.
    """
    model = Transformer(config, recompute=recompute, compute=compute)
    randomize(model, seed=0)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    generator = torch.Generator().manual_seed(0)
    depths = 1 + len(model.mtp)
    tokens_BKS = torch.randint(64, (B, depths, S), generator=generator)
    labels_T = torch.randint(64, (depths * B * S,), generator=generator)
    positions_BS, weights_T = torch.arange(S).expand(B, -1), torch.ones(depths * B * S)
    made_before: list[Tensor] = []
    if gemm is not Gemm.compute:
        policy = Fp8Policy(PrecisionConfig(gemm=gemm))
        install_fp8(model, policy)
        with torch.no_grad():
            model(tokens_BKS, positions_BS)
        codes = [policy.weights.codes(w, power_of_two=False) for w in coded_weights(model)]
        made_before = [tensor for code in codes for tensor in (code.codes, code.scales)]
    with LiveBytes() as live:
        output = model(tokens_BKS, positions_BS, balance_scale=0.5)
        hidden_TD = torch.cat(output.hidden_KBSD).flatten(0, 1)
        loss, token_loss_T = linear_cross_entropy(hidden_TD, model.head.weight, labels_T, weights_T)
        load_LE = output.load_LE
        del output, hidden_TD, token_loss_T
    live.forget(tokens_BKS, positions_BS, labels_T, weights_T, loss, load_LE, *made_before)
    live.forget(*model.parameters(), *model.buffers())
    if gemm is not Gemm.compute or recompute is Recompute.full:
        return live.num_bytes
    rows = int((-load_LE % WINDOW_MULTIPLE).sum())
    return live.num_bytes - rows * (2 * element_bytes(compute) * config.moe.intermediate_size + 4)


def coded_weights(model: Transformer) -> list[Tensor]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if (".attn." in name or ".ffn." in name) and parameter.dim() > 1 and "gate" not in name
    ]


@pytest.mark.parametrize("gemm", [Gemm.compute, Gemm.fp8_reference])
@pytest.mark.parametrize(
    ("shape", "compute"), [*((shape, Compute.bf16) for shape in SHAPES), ("V3's", Compute.fp32)]
)
def test_the_closed_form_is_what_the_graph_holds(shape: str, compute: Compute, gemm: Gemm) -> None:
    """Within 1 %, without what fills up the rows of experts, of which the formula has the mean."""
    config = SHAPES[shape]()
    for recompute in Recompute:
        predicted = microbatch_saved_bytes(
            config,
            layers=range(config.num_layers),
            first=True,
            last=True,
            tokens=B * S,
            recompute=recompute,
            compute=compute,
            gemm=gemm,
            spread=Spread(experts=0),
        )
        assert predicted == pytest.approx(measure(config, recompute, compute, gemm), rel=0.01), recompute


def test_parts_of_a_model_add_up() -> None:
    config = small(**WIDTHS, num_mtp_layers=1)
    how = {"recompute": Recompute.deepseek, "compute": Compute.bf16, "gemm": Gemm.fp8_reference}

    def part(layers: range, *, first: bool = False, last: bool = False) -> int:
        return microbatch_saved_bytes(config, layers=layers, first=first, last=last, tokens=100, **how)

    table = 100 * 4 * config.attention.qk_rope_head_dim
    whole = part(range(3), first=True, last=True)
    assert part(range(2), first=True) + part(range(2, 3), last=True) == whole + table
    of_layers = sum(saved_bytes_per_token(config, layer=i, **how) for i in range(3))
    assert part(range(3)) == 100 * of_layers + table
    with_mtp, without = part(range(0), last=True), 100 * mtp_saved_bytes_per_token(config, **how)
    assert with_mtp > without > 100 * saved_bytes_per_token(config, layer=2, **how)


def test_rows_of_experts_are_filled_up() -> None:
    """By half a block on average, gate, up and routing weights, in the compute type alone."""
    config = small(**WIDTHS)
    of_row = 2 * 2 * config.moe.intermediate_size + 4

    def part(gemm: Gemm, recompute: Recompute, experts: int) -> int:
        how = {"recompute": recompute, "compute": Compute.bf16, "gemm": gemm}
        return microbatch_saved_bytes(
            config, layers=[0, 1], first=False, last=False, tokens=100, spread=Spread(experts=experts), **how
        )

    for gemm, recompute, rows in (
        (Gemm.compute, Recompute.deepseek, 3 * 31.5),
        (Gemm.compute, Recompute.full, 0),
        (Gemm.fp8_reference, Recompute.none, 0),
    ):
        assert part(gemm, recompute, 3) - part(gemm, recompute, 0) == rows * of_row


def test_rows_that_arrive_as_codes_have_a_byte_of_scale_for_each_tile() -> None:
    config = small(**WIDTHS)
    how = {"recompute": Recompute.deepseek, "compute": Compute.bf16, "gemm": Gemm.fp8_reference}
    numbers, codes = (
        saved_bytes_per_token(
            config, layer=2, spread=Spread(routed_rows=3, arrived_rows=3, coded_rows=coded), **how
        )
        for coded in (False, True)
    )
    assert numbers - codes == 3 * (2 * config.hidden_size - (config.hidden_size + 2))


def test_constants_are_those_of_the_kernels() -> None:
    assert EXPERT_ROWS == WINDOW_MULTIPLE
    assert FP8_TILE == BLOCK


def saving(config: ModelConfig, recompute: Recompute) -> float:
    """Return by how much FP8 reduces the saved bytes of all decoder layers."""
    of_gemm = [
        sum(
            saved_bytes_per_token(config, layer=i, recompute=recompute, compute=Compute.bf16, gemm=gemm)
            for i in range(config.num_layers)
        )
        for gemm in (Gemm.compute, Gemm.fp8_reference)
    ]
    return 1 - of_gemm[1] / of_gemm[0]


def test_fp8_saves_more_than_a_third_of_deepseek_v3() -> None:
    """And nothing where blocks are recomputed as a whole."""
    v3 = ModelConfig()
    assert saving(v3, Recompute.deepseek) > 0.36
    assert saving(v3, Recompute.none) > 0.25
    assert saving(v3, Recompute.full) == 0


def test_fp8_saves_more_than_a_third_of_a_small_v3() -> None:
    """V3 with its widths divided by 14, heads of its size."""
    config = small(
        hidden_size=512,
        num_heads=9,
        q_lora_rank=112,
        kv_lora_rank=36,
        qk_nope_head_dim=128,
        qk_rope_head_dim=4,
        v_head_dim=128,
        dense_intermediate_size=1280,
        intermediate_size=128,
        num_experts=16,
        top_k=8,
        num_groups=1,
        top_k_groups=1,
    )
    how = {"compute": Compute.bf16, "recompute": Recompute.deepseek}
    ends = microbatch_saved_bytes(
        config, layers=range(0), first=True, last=True, tokens=B * S, gemm=Gemm.compute, **how
    )
    bf16, fp8 = (measure(config, gemm=gemm, **how) - ends for gemm in (Gemm.compute, Gemm.fp8_reference))
    assert fp8 / bf16 < 0.65
