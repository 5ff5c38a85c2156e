"""FP8 at the seams: against explicit quantisation, and the same bits however the step is run."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backends.kernels import REFERENCE, Fp8Kernels, ReferenceKernels
from model.block import Block
from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig, Recompute
from model.experts import Experts
from model.feedforward import FeedForward
from model.fp8 import Fp8Policy, Fp8Weights, install_fp8
from model.fp8_watch import Fp8Watch
from model.kernels import reference
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, BlockShape, Quantized, quantize
from model.kernels.fp8_experts import ExpertScales, Padding, fp8_expert_ffn
from model.kernels.grouped_gemm import expert_ffn
from model.linear import Linear
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model.kernels.compare import relative_error
from tests.model.live_bytes import LiveBytes
from tests.model.oracle import randomize
from tests.model.small import relative, small

S = 16
SIZES: dict[str, object] = {
    "hidden_size": 160,  # more than one tile, and a part of one
    "dense_intermediate_size": 144,
    "intermediate_size": 132,
    "num_mtp_layers": 1,
}


def policy(scales: Fp8Scales, kernels: Fp8Kernels = REFERENCE) -> Fp8Policy:
    return Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference, fp8_scales=scales), kernels=kernels)


class Counting(ReferenceKernels):
    """Notes the blocks of what is quantised by one call for each."""

    def __init__(self) -> None:
        self.made: list[BlockShape] = []

    def quantize(self, x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
        self.made.append(block)
        return super().quantize(x, block, power_of_two=power_of_two)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake(x: Tensor, block: BlockShape, *, power_of_two: bool) -> Tensor:
    """Return x quantised and decoded, FP32: written out once more, for matrices, without caches or tricks."""
    rows, columns = x.shape
    high, wide = block
    padded = F.pad(x.float(), (0, -columns % wide, 0, -rows % high))
    tiles = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    amax = tiles.abs().amax((1, 3), keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / 448)
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
    decoded = (tiles / scales).to(torch.float8_e4m3fn).float() * scales
    return decoded.view(padded.shape)[:rows, :columns]


class PlainLinear(torch.autograd.Function):
    """The three products of a linear map on quantised operands, FP32, for a matrix x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, x_two: bool, others_two: bool) -> Tensor:
        x8 = fake(x, ROW_TILE, power_of_two=x_two)
        w8 = fake(w, SQUARE, power_of_two=others_two)
        ctx.save_for_backward(x8, w8)
        ctx.two = x_two, others_two
        return (x8 @ w8.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x8, w8), (x_two, others_two) = grads, ctx.saved_tensors, ctx.two
        dx = fake(dy, ROW_TILE, power_of_two=others_two) @ w8
        turned = fake(x8, COLUMN_TILE, power_of_two=x_two)
        return dx.to(dy.dtype), fake(dy, COLUMN_TILE, power_of_two=others_two).T @ turned, None, None


def plain_linear(x: Tensor, w: Tensor, /, *, x_two: bool, others_two: bool) -> Tensor:
    y: Any = PlainLinear.apply(x.reshape(-1, x.shape[-1]), w, x_two, others_two)
    return y.view(*x.shape[:-1], len(w))


class PlainGated(torch.autograd.Function):
    """SwiGLU and the map after it, for matrices: its weight gradient is from the codes of gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, w: Tensor, x_two: bool, others_two: bool) -> Tensor:
        row = partial(fake, block=ROW_TILE, power_of_two=x_two)
        w8 = fake(w, SQUARE, power_of_two=others_two)
        ctx.save_for_backward(row(gate), row(up), w8)
        ctx.two = x_two, others_two
        return (row(F.silu(gate.float()) * up.float()) @ w8.T).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (gate, up, w8), (x_two, others_two) = grads, ctx.saved_tensors, ctx.two
        dhidden = (fake(dy, ROW_TILE, power_of_two=others_two) @ w8).to(dy.dtype).float()
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (gate, up)]
            hidden = F.silu(leaves[0]) * leaves[1]
        dgate, dup = (g.to(dy.dtype) for g in torch.autograd.grad(hidden, leaves, dhidden))
        turned = fake(hidden.detach(), COLUMN_TILE, power_of_two=x_two)
        return dgate, dup, fake(dy, COLUMN_TILE, power_of_two=others_two).T @ turned, None, None


def plain_gated(up: Tensor, gate: Tensor, w: Tensor, /, *, x_two: bool, others_two: bool) -> Tensor:
    y: Any = PlainGated.apply(*(t.reshape(-1, t.shape[-1]) for t in (gate, up)), w, x_two, others_two)
    return y.view(*gate.shape[:-1], len(w))


class PlainExpert(torch.autograd.Function):
    """One expert's network and its gradients, FP32, with the scales of ExpertScales as in `two`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, two: ExpertScales
    ) -> Tensor:
        row = partial(fake, block=ROW_TILE, power_of_two=two.others)
        x8 = fake(x, ROW_TILE, power_of_two=True)
        w1, w3, w2 = (fake(w, SQUARE, power_of_two=two.others) for w in (w1, w3, w2))
        gate, up = (x8 @ w1.T).to(x.dtype), (x8 @ w3.T).to(x.dtype)
        hidden = F.silu(gate.float()) * up.float() * weights[:, None]
        ctx.save_for_backward(x8, w1, w3, w2, row(gate), row(up), weights)
        ctx.two = two
        return (row(hidden) @ w2.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x8, w1, w3, w2, gate, up, weights), two = grads, ctx.saved_tensors, ctx.two
        row = partial(fake, block=ROW_TILE, power_of_two=two.others)
        column = partial(fake, block=COLUMN_TILE, power_of_two=two.others)
        dy8 = fake(dy, ROW_TILE, power_of_two=two.output_grad)
        dhidden = (dy8 @ w2).to(dy.dtype).float()
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (gate, up, weights)]
            hidden = F.silu(leaves[0]) * leaves[1] * leaves[2][:, None]
        dgate, dup, dweights = torch.autograd.grad(hidden, leaves, dhidden)
        dx = (row(dgate) @ w1).to(dy.dtype) + (row(dup) @ w3).to(dy.dtype)
        turned = fake(x8, COLUMN_TILE, power_of_two=True)
        dw2 = fake(dy8, COLUMN_TILE, power_of_two=two.output_grad).T @ column(hidden.detach())
        return dx, column(dgate).T @ turned, column(dup).T @ turned, dw2, dweights, None


def plain_experts(
    rows: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    counts: list[int],
    weights: Tensor,
    /,
    *,
    two: ExpertScales,
) -> Tensor:
    parts = zip(rows.split(counts), w1, w3, w2, weights.split(counts), strict=True)
    outputs: list[Any] = [PlainExpert.apply(*part, two) for part in parts if len(part[0])]
    return torch.cat(outputs)


def scales_of(scales: Fp8Scales) -> tuple[dict[str, bool], dict[str, bool], ExpertScales]:
    """Return for most linear maps, for attention's output and for experts which scales are powers of two."""
    all_two = scales is Fp8Scales.power_of_two
    usual = {"x_two": all_two, "others_two": all_two}
    return usual, usual | {"x_two": True}, ExpertScales(output_grad=True, others=all_two)


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("shape", [(2, 3, 130), (300, 256), (1, 5), (0, 8)])
def test_the_three_products_of_a_linear_map(scales: Fp8Scales, shape: tuple[int, ...]) -> None:
    """The explicit ones in FP32: bit for bit where the same GEMM runs, not with powers of two."""
    results = []
    fp8 = policy(scales)
    ours = partial(fp8.linear, scales=fp8.linear_scales("ffn.w1"))
    for function in (ours, partial(plain_linear, **scales_of(scales)[0])):
        x, w = normal(*shape).requires_grad_(), normal(140, shape[-1], seed=1).requires_grad_()
        y = function(x, w)
        y.backward(normal(*y.shape, seed=2))
        results.append((y, x.grad, w.grad))
    for ours_, plain in zip(*results, strict=True):
        assert relative_error(ours_, plain) < 1e-6
        assert scales is Fp8Scales.power_of_two or torch.equal(ours_, plain)


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("shape", [(2, 3, 130), (300, 256), (0, 8)])
def test_a_gated_map_keeps_codes_of_gate_and_up(scales: Fp8Scales, shape: tuple[int, ...]) -> None:
    results = []
    fp8 = policy(scales)
    ours = partial(fp8.gated_linear, scales=fp8.linear_scales("ffn.w2"))
    for function in (ours, partial(plain_gated, **scales_of(scales)[0])):
        gate, up, w = (
            normal(*s, seed=i).requires_grad_() for i, s in enumerate([shape, shape, (140, shape[-1])])
        )
        y = function(up, gate, w)
        y.backward(normal(*y.shape, seed=3))
        results.append((y, gate.grad, up.grad, w.grad))
    for ours_, plain in zip(*results, strict=True):
        assert relative_error(ours_, plain) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", Fp8Scales)
def test_half_precision_results_are_those_rounded_once(dtype: torch.dtype, scales: Fp8Scales) -> None:
    x, w = normal(64, 200).to(dtype).requires_grad_(), normal(140, 200, seed=1).to(dtype).requires_grad_()
    w.grad_dtype = torch.float32
    dy = normal(64, 140, seed=2).to(dtype)
    fp8 = policy(scales)
    y = fp8.linear(x, w, scales=fp8.linear_scales("ffn.w1"))
    y.backward(dy)
    x32, w32 = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    expected = plain_linear(x32, w32, **scales_of(scales)[0])
    expected.backward(dy.float())
    assert y.dtype == x.grad.dtype == dtype
    assert w.grad.dtype == torch.float32
    assert relative_error(y, expected) < 2**-8
    assert relative_error(x.grad, x32.grad) < 2**-8
    assert relative_error(w.grad, w32.grad) < 1e-6


def run_experts(function: Callable[..., Tensor], counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of rows, w1, w3, w2 and row weights."""
    num_rows = sum(counts)
    shapes = [(num_rows, 140), (4, 136, 140), (4, 136, 140), (4, 140, 136)]
    rows, *ws = leaves = [normal(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    for w in ws:
        w.grad_dtype = torch.float32
    weights = normal(num_rows, seed=9).sigmoid().requires_grad_()
    y = function(rows, *ws, counts, weights)
    y.backward(normal(*y.shape, seed=10).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in (*leaves, weights))]


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("counts", [[70, 0, 5, 130], [0, 0, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(scales: Fp8Scales, counts: list[int], dtype: torch.dtype) -> None:
    """Against each expert alone and unpadded; experts without rows get zero gradients."""
    expected = run_experts(partial(plain_experts, two=scales_of(scales)[2]), counts, dtype)
    for ours, plain in zip(run_experts(policy(scales).experts, counts, dtype), expected, strict=True):
        assert ours.dtype == plain.dtype
        assert relative(ours.float(), plain.float()) < (1e-5 if dtype == torch.float32 else 2e-3)


def test_experts_without_any_rows() -> None:
    output, drows, *dws, dweights = run_experts(policy(Fp8Scales.deepseek).experts, [0] * 4, torch.bfloat16)
    assert output.shape == drows.shape == (0, 140)
    assert dweights.shape == (0,)
    assert all(dw.dtype == torch.float32 and not dw.any() for dw in dws)


def test_experts_are_padded_with_no_more_rows_than_they_need() -> None:
    padding, rows = Padding.of([128, 0, 5, 256], torch.device("cpu")), normal(389, 3)
    assert padding.sizes == [128, 0, 128, 256]
    assert torch.equal(padding.add(rows)[:133], rows[:133])
    assert torch.equal(padding.remove(padding.add(rows)), rows)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_experts_are_the_elementwise_reference(power_of_two: bool) -> None:
    counts, two = [3, 0, 2], ExpertScales(output_grad=power_of_two, others=power_of_two)
    rows, weights = normal(5, 130), normal(5, seed=9).sigmoid()
    ws = [normal(*shape, seed=i) / 10 for i, shape in enumerate([(3, 20, 130), (3, 20, 130), (3, 130, 20)])]

    def codes(weight: Tensor) -> Any:
        return quantize(weight, SQUARE, power_of_two=power_of_two)

    row_codes = quantize(rows, ROW_TILE, power_of_two=power_of_two)
    ours = fp8_expert_ffn(rows, *ws, counts, weights, row_codes=row_codes, weight_codes=codes, scales=two)
    each = [tuple(codes(w[expert]) for w in ws) for expert in range(3)]
    assert relative_error(ours, reference.fp8_expert_ffn(rows, each, counts, weights)) < 1e-6


def make(compute: Compute, recompute: Recompute = Recompute.none, **changes: object) -> Transformer:
    """Return a model whose gradients exist, in FP32, as those of the flat buffers do."""
    model = Transformer(small(**SIZES | changes), recompute=recompute, compute=compute)
    randomize(model, seed=0)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape)
    return model


def loss_of(model: Transformer, microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(microbatch)
    tokens_BKS = torch.randint(64, (2, 1 + len(model.mtp), S), generator=generator)
    output = model(tokens_BKS, torch.arange(S).expand(2, -1), balance_scale=0.5)
    weighted = [
        hidden_BSD.float() * torch.randn(hidden_BSD.shape, generator=generator)
        for hidden_BSD in output.hidden_KBSD
    ]
    return torch.stack(weighted).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def install_plainly(model: Transformer, scales: Fp8Scales) -> None:
    usual, attention_output, experts = scales_of(scales)
    for layer in [*model.layers.values(), *(depth.block for depth in model.mtp.values())]:
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                module.gemm = partial(plain_linear, **(attention_output if name == "attn.wo" else usual))
            if isinstance(module, FeedForward):
                module.gated_gemm = partial(plain_gated, **usual)
            if isinstance(module, Experts):
                module.feed_forward = partial(plain_experts, two=experts)


@pytest.mark.parametrize("scales", Fp8Scales)
def test_a_whole_model_against_explicit_quantisation(scales: Fp8Scales) -> None:
    """In FP32, where only the order of a few sums differs; that moves a value at a boundary to the next code.

    A wrong block or scale anywhere would show as percents.
    """
    plain, ours = make(Compute.fp32), make(Compute.fp32)
    install_plainly(plain, scales)
    install_fp8(ours, policy(scales))
    losses = [loss_of(model, 0) for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for name, gradient in gradients(ours).items():
        assert relative(gradient, gradients(plain)[name]) < 2e-3, name


@pytest.mark.parametrize("scales", Fp8Scales)
@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_recomputation_and_putting_off_change_no_bit(scales: Fp8Scales, compute: Compute) -> None:
    expected: dict[str, Tensor] = {}
    for recompute in Recompute:
        for put_off in (False, True):
            model, later = make(compute, recompute), WeightGradients()
            install_fp8(model, policy(scales), later if put_off else None)
            install(model, later)
            waiting = []
            for microbatch in range(2):
                loss = loss_of(model, microbatch)
                if put_off:
                    with later.put_off() as work:
                        loss.backward()
                    waiting.append(work)
                else:
                    loss.backward()
            for work in waiting:
                assert len(work) > 30
                for product in reversed(work):
                    product()
            expected = expected or gradients(model)
            for name, gradient in gradients(model).items():
                assert torch.equal(gradient, expected[name]), (recompute, put_off, name)
    assert all(gradient.any() for name, gradient in expected.items() if name != "head.weight")


def test_gradients_in_bf16_are_rounded_as_autograd_rounds_them() -> None:
    """Each microbatch's by itself, before they are added."""
    results = []
    for put_off in (False, True):
        later, fp8 = WeightGradients(), policy(Fp8Scales.deepseek)
        shapes = [(140, 160), (2, 36, 160), (2, 36, 160), (2, 160, 36)]
        w, *ws = (nn.Parameter(normal(*shape, seed=i).bfloat16()) for i, shape in enumerate(shapes))
        for seed in range(2):
            x, row_weights = normal(9, 160, seed=seed).bfloat16(), torch.ones(9)
            y = fp8.linear(x, w, scales=fp8.linear_scales("ffn.w1"), later=later.later)
            z = fp8.experts(x, *ws, [4, 5], row_weights, later=later.later)
            with later.put_off() if put_off else nullcontext([]) as work:
                torch.autograd.backward([y, z], [normal(*out.shape, seed=7).bfloat16() for out in (y, z)])
            for product in work:
                product()
        results.append([weight.grad for weight in (w, *ws)])
    for now_, later_ in zip(*results, strict=True):
        assert now_.dtype == torch.bfloat16
        assert torch.equal(now_, later_)


@pytest.mark.parametrize("scales", Fp8Scales)
def test_gradients_stay_near_those_of_fp32(scales: Fp8Scales) -> None:
    """A band, not a proof: E4M3 rounds operands by 2 to 3 percent. No experts, whose choice would flip."""
    plain, ours = (make(Compute.fp32, num_dense_layers=3, num_mtp_layers=0) for _ in range(2))
    install_fp8(ours, policy(scales))
    for model in (plain, ours):
        loss_of(model, 0).backward()
    for name, gradient in gradients(ours).items():
        if name != "head.weight":
            assert 1e-2 < relative(gradient, gradients(plain)[name]) < 0.6, name


def test_what_is_fp8_and_what_is_not() -> None:
    model = make(Compute.bf16)
    install_fp8(model, policy(Fp8Scales.deepseek))
    for name, module in model.named_modules():
        inside = ".attn." in name or ".ffn." in name
        if isinstance(module, Linear):
            assert (module.gemm is F.linear) != inside, name
        if isinstance(module, Experts):
            assert module.feed_forward is not expert_ffn
    assert model.head.gemm is F.linear
    assert model.mtp["0"].eh_proj.gemm is F.linear
    assert sum(isinstance(module, Block) for module in model.modules()) == 4


def test_scales_of_deepseek() -> None:
    """Section 3.3.3: powers of two for the input of attention's output and what experts exchange."""
    deepseek, rounded = policy(Fp8Scales.deepseek), policy(Fp8Scales.power_of_two)
    assert [deepseek.linear_scales(name).x for name in ("attn.wo", "attn.wq_a", "ffn.w2")] == [
        True,
        False,
        False,
    ]
    assert not deepseek.linear_scales("attn.wo").others
    assert rounded.linear_scales("ffn.w1").x
    assert rounded.linear_scales("ffn.w1").others


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


def test_what_is_not_finite_stays_visible() -> None:
    fp8 = policy(Fp8Scales.deepseek)
    x, w = torch.ones(4, 256, requires_grad=True), torch.ones(8, 256, requires_grad=True)
    for bad in (torch.inf, torch.nan):
        broken = x.detach().clone()
        broken[1, 3] = bad
        y = fp8.linear(broken.requires_grad_(), w, scales=fp8.linear_scales("attn.wo"))
        assert y.isnan().any(-1).tolist() == [False, True, False, False]
        dy = torch.ones_like(y)
        dy[2, 0] = bad
        y.backward(dy)
        assert broken.grad.isnan().any(-1).tolist() == [False, False, True, False]
        assert w.grad[0].isnan().all()
