"""Codes are made once, kept no longer than needed, and forgotten with what they are of."""

import gc

import torch
from torch import Tensor, nn

from model.backends.kernels import ReferenceKernels
from model.config import Compute, Fp8Scales
from model.fp8 import Fp8Weights, install_fp8
from model.fp8_watch import Fp8Watch
from model.kernels.fp8 import SQUARE, BlockShape, Quantized
from tests.model.kernels.compare import relative_error
from tests.model.live_bytes import LiveBytes
from tests.model.plain_fp8 import make, normal, plain_linear, policy
from tests.model.trainable import loss_of


class Counting(ReferenceKernels):
    """Notes the blocks of what is quantised by one call for each."""

    def __init__(self) -> None:
        self.made: list[BlockShape] = []

    def quantize(self, x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
        self.made.append(block)
        return super().quantize(x, block, power_of_two=power_of_two)


def test_weights_are_quantised_once_until_they_are_forgotten() -> None:
    kernels = Counting()
    made = kernels.made
    model, fp8 = make(Compute.bf16), policy(Fp8Scales.deepseek, kernels)
    install_fp8(model, fp8)
    matrices = [
        name for name, p in model.named_parameters() if ("attn" in name or "ffn" in name) and p.dim() > 1
    ]
    num_weights = sum("gate" not in name for name in matrices)
    for microbatch in range(2):
        loss_of(model, microbatch).backward()
    assert made.count(SQUARE) == num_weights
    weight = model.layers["0"].attn.wo.weight
    before = fp8.weights.codes(weight, power_of_two=False)
    with torch.no_grad():
        weight.mul_(2)
    assert fp8.weights.codes(weight, power_of_two=False) is before
    fp8.weights.forget()
    assert torch.equal(fp8.weights.codes(weight, power_of_two=False).scales, 2 * before.scales)
    loss_of(model, 0).backward()
    assert made.count(SQUARE) == 2 * num_weights


def test_codes_of_a_weight_go_with_it() -> None:
    """A new weight in the memory of an old one is another weight."""
    weights, flat = Fp8Weights(Fp8Watch()), torch.ones(4)
    first = nn.Parameter(flat.view(2, 2))
    assert weights.codes(first, power_of_two=True).scales.item() == 2.0**-8
    del first
    gc.collect()
    flat.fill_(2)
    assert weights.codes(nn.Parameter(flat.view(2, 2)), power_of_two=True).scales.item() == 2.0**-7


def test_maps_that_share_an_input_share_its_codes() -> None:
    kernels = Counting()
    made = kernels.made
    fp8, x = policy(Fp8Scales.deepseek, kernels), torch.ones(3, 8)
    weights = [nn.Parameter(torch.ones(4, 8)) for _ in range(2)]

    def multiply() -> list[Tensor]:
        return [fp8.linear(x, weight, scales=fp8.linear_scales("ffn.w1")) for weight in weights]

    multiply()
    assert len(made) == 3
    x.mul_(3)
    (doubled, _) = multiply()
    assert len(made) == 4
    torch.testing.assert_close(doubled, torch.full((3, 4), 24.0), rtol=1e-6, atol=0.0)


def test_codes_that_are_shared_have_the_scales_that_are_asked_for() -> None:
    fp8, x, weight = policy(Fp8Scales.deepseek), normal(3, 8), nn.Parameter(normal(4, 8, seed=1))
    for name in ("ffn.w1", "attn.wo", "ffn.w1"):
        scales = fp8.linear_scales(name)
        expected = plain_linear(x, weight, x_two=scales.x, others_two=scales.others)
        assert relative_error(fp8.linear(x, weight, scales=scales), expected) < 1e-6
    assert fp8.weights.codes(weight, power_of_two=True).power_of_two


def test_of_an_input_only_codes_are_kept() -> None:
    """One byte an element and a scale for each 128, once for the maps that take the same tensor."""
    fp8, x = policy(Fp8Scales.deepseek), normal(64, 512).bfloat16().requires_grad_()
    weights = [nn.Parameter(normal(8, 512).bfloat16()) for _ in range(2)]
    with LiveBytes() as live:
        y = x * 1
        outputs = [fp8.linear(y, weight, scales=fp8.linear_scales("ffn.w1")) for weight in weights]
    del y
    live.forget(*outputs, *weights, x)
    codes_of_weights = 2 * (8 * 512 + 4 * 4)
    assert live.num_bytes == 64 * 512 + 4 * 64 * 4 + codes_of_weights


def test_experts_keep_codes_of_their_own_rows_only() -> None:
    fp8, num_rows, counts = policy(Fp8Scales.deepseek), 40, [30, 0, 10]
    rows, weights = normal(num_rows, 256).bfloat16().requires_grad_(), normal(num_rows, seed=1)
    ws = [nn.Parameter(normal(*s).bfloat16()) for s in [(3, 128, 256), (3, 128, 256), (3, 256, 128)]]
    with LiveBytes() as live:
        output = fp8.experts(rows, *ws, counts, weights)
    live.forget(output, rows, weights, *ws)
    codes_of_weights = 3 * 3 * (128 * 256 + 2 * 4)
    assert live.num_bytes == num_rows * (256 + 2 * 4 + 2 * (128 + 4)) + codes_of_weights
