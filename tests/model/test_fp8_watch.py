"""The watch on FP8 against counts made by hand, and the same counts however a step is run."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backends.kernels import ReferenceKernels
from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig, Recompute
from model.fp8 import Fp8Policy, install_fp8
from model.fp8_watch import Fp8Watch, TensorClass
from model.kernels.fp8 import ROW_TILE, SQUARE, BlockShape, Quantized, quantize
from model.transformer import Transformer
from model.weight_gradients import WeightGradients
from tests.model.oracle import randomize
from tests.model.small import small

CPU = torch.device("cpu")
PRECISION = PrecisionConfig(gemm=Gemm.fp8_reference, fp8_scales=Fp8Scales.deepseek)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of magnitudes so far apart that FP8 loses many, zeros among them."""
    x = normal(*shape, seed=seed) * torch.exp2(-(20 * normal(*shape, seed=seed + 1).abs()))
    x[..., ::5] = 0
    return x


def by_hand(x: Tensor, block: BlockShape, *, power_of_two: bool = False) -> list[int]:
    """Return elements that are not zero, that underflow, that saturate, tile by tile, in plain numbers."""
    high, wide = block
    found = [0, 0, 0]
    for top in range(0, x.shape[0], high):
        for left in range(0, x.shape[1], wide):
            tile = x[top : top + high, left : left + wide].double()
            amax = float(tile.abs().max())
            if amax == 0:
                continue
            scale = torch.tensor(amax).float() / 448
            if power_of_two:
                scale = torch.exp2(torch.log2(scale.double()).ceil())
            for value in tile.flatten().tolist():
                ratio = abs(value) / float(scale)
                found[0] += value != 0
                found[1] += value != 0 and ratio <= 2.0**-10  # half of the smallest code goes to even, zero
                found[2] += ratio >= 432  # half-way between 416 and 448 goes to 448, the even one
    return found


def counts(watch: Fp8Watch, kind: TensorClass) -> list[int]:
    return watch.totals(CPU).counts[list(TensorClass).index(kind)].tolist()


def amax(watch: Fp8Watch, kind: TensorClass) -> float:
    return float(watch.totals(CPU).amax[list(TensorClass).index(kind)])


def started(watch: Fp8Watch) -> Fp8Watch:
    watch.start(active=True)
    return watch


@pytest.mark.parametrize("block", [ROW_TILE, SQUARE])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (5, 300), (130, 140)])
def test_counts_are_those_made_by_hand(shape: tuple[int, int], block: BlockShape, power_of_two: bool) -> None:
    x = wide(*shape)
    watch = started(Fp8Watch())
    watch.see(TensorClass.GRADIENTS, x, quantize(x, block, power_of_two=power_of_two))
    expected = by_hand(x, block, power_of_two=power_of_two)
    assert expected[1] > 0
    assert counts(watch, TensorClass.GRADIENTS) == expected
    assert amax(watch, TensorClass.GRADIENTS) == float(x.abs().max())
    assert counts(watch, TensorClass.WEIGHTS) == [0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_an_infinite_magnitude(bad: float) -> None:
    x = normal(3, 256)
    x[1, 7] = bad
    watch = started(Fp8Watch())
    watch.see(TensorClass.ACTIVATIONS, x, quantize(x, ROW_TILE, power_of_two=False))
    assert amax(watch, TensorClass.ACTIVATIONS) == torch.inf
    x[1, :128] = 0  # a tile whose codes are NaN saturates nothing
    assert counts(watch, TensorClass.ACTIVATIONS)[2] == by_hand(x, ROW_TILE)[2]


def test_nothing_is_counted_unless_asked_for_and_start_forgets() -> None:
    watch, x = Fp8Watch(), normal(4, 128)
    codes = quantize(x, ROW_TILE, power_of_two=False)
    watch.see(TensorClass.ACTIVATIONS, x, codes)
    assert watch.sample(TensorClass.ACTIVATIONS, x, codes) is None
    assert watch.totals(CPU).counts.sum() == 0
    started(watch).see(TensorClass.ACTIVATIONS, x, codes)
    assert counts(watch, TensorClass.ACTIVATIONS)[0] == 512
    watch.start(active=False)
    assert watch.totals(CPU).counts.sum() == 0
    started(watch).see(TensorClass.ACTIVATIONS, x, codes)  # codes that outlived a step
    assert counts(watch, TensorClass.ACTIVATIONS)[0] == 512


def test_codes_without_rows_count_nothing() -> None:
    watch, x = started(Fp8Watch()), torch.empty(0, 128)
    watch.see(TensorClass.EXPERT_ROWS, x, quantize(x, ROW_TILE, power_of_two=True))
    assert counts(watch, TensorClass.EXPERT_ROWS) == [0, 0, 0]
    assert amax(watch, TensorClass.EXPERT_ROWS) == 0


def test_a_linear_map_by_hand() -> None:
    """Two maps take the same tensor, which counts once; a weight that others count does not count here."""
    x, w, v = wide(6, 160).requires_grad_(), wide(140, 160, seed=2).requires_grad_(), wide(30, 160, seed=4)
    policy = Fp8Policy(PRECISION, started(Fp8Watch([v])))
    linear = partial(policy.linear, scales=policy.linear_scales("ffn.w1"))
    dy, dz = wide(6, 140, seed=6), wide(6, 30, seed=8)
    for _ in range(2):  # two microbatches: the weight is quantised once
        torch.autograd.backward([linear(x * 1, w)], [dy])
    doubled = 2 * x
    torch.autograd.backward([linear(doubled, w), linear(doubled, v)], [dy, dz])
    watch = policy.watch
    of_x = by_hand(x.detach(), ROW_TILE)
    assert counts(watch, TensorClass.ACTIVATIONS) == [3 * n for n in of_x]
    assert counts(watch, TensorClass.WEIGHTS) == by_hand(w.detach(), SQUARE)
    of_dy, of_dz = by_hand(dy, ROW_TILE), by_hand(dz, ROW_TILE)
    assert counts(watch, TensorClass.GRADIENTS) == [3 * a + b for a, b in zip(of_dy, of_dz, strict=True)]
    assert amax(watch, TensorClass.ACTIVATIONS) == float(2 * x.detach().abs().max())


def test_experts_by_hand() -> None:
    """One expert is idle; rows and the gradients of the output have power-of-two scales."""
    numbers, weights = [3, 0, 2], torch.rand(5) + 0.5
    rows = wide(5, 160)
    w1, w3 = normal(3, 132, 160, seed=2) * 0.1, normal(3, 132, 160, seed=3) * 0.1
    w2 = normal(3, 160, 132, seed=4) * 0.1
    leaves = [x.requires_grad_() for x in (rows, w1, w3, w2)]
    policy = Fp8Policy(PRECISION, started(Fp8Watch()))
    dy = wide(5, 160, seed=6)
    policy.experts(leaves[0], *leaves[1:], numbers, weights).backward(dy)

    def decoded(x: Tensor, block: BlockShape, two: bool) -> Tensor:
        return quantize(x.detach(), block, power_of_two=two).dequantize()

    kind, of = TensorClass, partial(counts, policy.watch)
    assert of(kind.EXPERT_ROWS) == by_hand(rows.detach(), ROW_TILE, power_of_two=True)
    assert of(kind.WEIGHTS) == _sum(*(by_hand(e, SQUARE) for w in (w1, w3, w2) for e in w.detach()))
    x8, dy8 = decoded(rows, ROW_TILE, True), decoded(dy, ROW_TILE, True)
    experts = torch.tensor([0, 0, 0, 2, 2])
    gate, up = (torch.einsum("rd,rid->ri", x8, decoded(w, SQUARE, False)[experts]) for w in (w1, w3))
    hidden = F.silu(gate) * up * weights[:, None]
    assert of(kind.ACTIVATIONS)[0] == by_hand(hidden, ROW_TILE)[0]
    assert abs(of(kind.ACTIVATIONS)[1] - by_hand(hidden, ROW_TILE)[1]) <= 1  # sums in another order
    largest = float(hidden.detach().abs().max())
    assert amax(policy.watch, kind.ACTIVATIONS) == pytest.approx(largest, rel=1e-5)
    dhidden = torch.einsum("rd,rdi->ri", dy8, decoded(w2, SQUARE, False)[experts])
    gate8, up8 = (decoded(x, ROW_TILE, False).requires_grad_() for x in (gate, up))
    (F.silu(gate8) * up8 * weights[:, None]).backward(dhidden)
    assert gate8.grad is not None
    assert up8.grad is not None
    expected = _sum(
        by_hand(dy, ROW_TILE, power_of_two=True), by_hand(gate8.grad, ROW_TILE), by_hand(up8.grad, ROW_TILE)
    )
    assert of(kind.GRADIENTS)[0] == expected[0]
    assert abs(of(kind.GRADIENTS)[1] - expected[1]) <= 2


def _sum(*found: list[int]) -> list[int]:
    return [sum(column) for column in zip(*found, strict=True)]


def model_totals(recompute: Recompute, *, put_off: bool) -> tuple[list[list[int]], list[float]]:
    """Run two microbatches of a model with every kind of layer; return what was counted."""
    config = small(hidden_size=160, dense_intermediate_size=144, intermediate_size=132, num_mtp_layers=1)
    model = Transformer(config, recompute=recompute, compute=Compute.bf16)
    randomize(model, seed=1)
    watch, later = started(Fp8Watch()), WeightGradients()
    install_fp8(model, Fp8Policy(PRECISION, watch), later if put_off else None)
    positions_BS = torch.arange(12).expand(2, 12)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tokens_BKS = torch.randint(0, config.vocab_size, (2, 2, 12), generator=generator)
        output = model(tokens_BKS, positions_BS, balance_scale=0.5)
        loss = torch.stack([hidden_BSD.float().square().sum() for hidden_BSD in output.hidden_KBSD]).sum()
        with later.put_off() if put_off else nullcontext():
            loss.backward()
    totals = watch.totals(CPU)
    return totals.counts.tolist(), totals.amax.tolist()


def test_recomputation_counts_nothing_twice() -> None:
    expected = model_totals(Recompute.none, put_off=False)
    assert all(present > 0 for present, _, _ in expected[0])
    assert model_totals(Recompute.none, put_off=True) == expected
    for recompute in (Recompute.deepseek, Recompute.core, Recompute.full):
        assert model_totals(recompute, put_off=False) == expected, recompute


class WrongScales(ReferenceKernels):
    """Scales of 1 x 128 tiles that are wrong by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def quantize_both(self, x_RC: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
        right, columns = super().quantize_both(x_RC, power_of_two=power_of_two)
        scales = right.scales * self.factor
        codes = (x_RC.float() / scales.repeat_interleave(128, 1)[:, : x_RC.shape[1]]).clamp(-448, 448)
        return Quantized(codes.to(torch.float8_e4m3fn), scales, right.block, power_of_two), columns


@pytest.mark.parametrize(("factor", "place"), [(1 / 8, 2), (2.0**16, 1)])
def test_wrong_scales_show(factor: float, place: int) -> None:
    """A scale that is too small saturates, one that is too large underflows."""
    found = []
    for kernels in (ReferenceKernels(), WrongScales(factor)):
        policy = Fp8Policy(PRECISION, started(Fp8Watch()), kernels=kernels)
        x, w = normal(16, 256).requires_grad_(), normal(128, 256, seed=1).requires_grad_()
        y = policy.linear(x, w, scales=policy.linear_scales("ffn.w1"))
        y.backward(normal(16, 128, seed=2))
        found.append(counts(policy.watch, TensorClass.GRADIENTS))
    right, wrong = found
    assert wrong[0] == right[0]
    assert wrong[place] > 0.1 * right[0] > 5 * right[place]
