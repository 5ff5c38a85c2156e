"""The Triton backend against the reference, in the interpreter: layers and a model, forward and backward.

The kernels alone are tested in tests/model/kernels/triton. Here the policy runs on them, so that operands of
which no kernel test makes any (views, transposes, weights both ways) reach them as they do in training.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from model.backends.kernels import REFERENCE, Fp8Kernels
from model.config import Compute, Fp8Scales, PrecisionConfig
from model.fp8 import Fp8Policy, install_fp8
from model.kernels.fp8 import COLUMN_TILE, ROW_TILE, SQUARE, Quantized
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model.kernels.compare import relative_error
from tests.model.kernels.triton.conftest import Interpret, set_interpreter
from tests.model.oracle import randomize
from tests.model.small import small

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is for Linux only")


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    """Call a function of this module where Triton interprets its kernels: another process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_interpreter) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def triton_kernels() -> Fp8Kernels:
    from model.backends.triton import TritonKernels

    return TritonKernels()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def policy(scales: Fp8Scales, kernels: Fp8Kernels) -> Fp8Policy:
    return Fp8Policy(PrecisionConfig(fp8_scales=scales), kernels=kernels)


def same_codes(ours: Quantized, theirs: Quantized) -> None:
    assert (ours.block, ours.power_of_two) == (theirs.block, theirs.power_of_two)
    assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
    assert torch.equal(ours.scales, theirs.scales)


def check_quantisation() -> None:
    """Codes and scales, bit for bit, of what is contiguous and what is not."""
    triton = triton_kernels()
    for power_of_two in (False, True):
        for x in (normal(140, 130).T, normal(130, 280).bfloat16()[:, ::2]):  # not contiguous
            for block in (ROW_TILE, COLUMN_TILE, SQUARE):
                ours, theirs = (k.quantize(x, block, power_of_two=power_of_two) for k in (triton, REFERENCE))
                same_codes(ours, theirs)
                same_codes(ours.T, theirs.T)
            both = [k.quantize_both(x, power_of_two=power_of_two) for k in (triton, REFERENCE)]
            for ours, theirs in zip(*both, strict=True):
                same_codes(ours, theirs)
            rows = both[1][0]
            same_codes(triton.requantize_columns(rows), REFERENCE.requantize_columns(rows))
            assert torch.equal(triton.dequantize(rows), REFERENCE.dequantize(rows))
        stack = normal(2, 130, 20)
        ours, theirs = (k.quantize(stack, SQUARE, power_of_two=power_of_two) for k in (triton, REFERENCE))
        same_codes(ours, theirs)
        same_codes(ours.T, theirs.T)


def check_a_weight_is_not_copied() -> None:
    codes = triton_kernels().quantize(normal(130, 140), SQUARE, power_of_two=True)
    assert codes.codes.is_contiguous()
    assert codes.T.codes.is_contiguous()
    assert codes.T.scales.is_contiguous()


def linear(kernels: Fp8Kernels, scales: Fp8Scales, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of a map and of a gated map."""
    fp8, results = policy(scales, kernels), []
    x, w = normal(2, 9, 200).to(dtype).requires_grad_(), normal(140, 200, seed=1).to(dtype).requires_grad_()
    gate, up = (normal(2, 9, 200, seed=seed).to(dtype).requires_grad_() for seed in (3, 4))
    gated = normal(140, 200, seed=5).to(dtype).requires_grad_()
    for weight in (w, gated):
        weight.grad_dtype = torch.float32
    outputs = (
        fp8.linear(x, w, scales=fp8.linear_scales("attn.wo")),
        fp8.gated_linear(up, gate, gated, scales=fp8.linear_scales("ffn.w2")),
    )
    for y in outputs:
        y.backward(normal(2, 140, 9, seed=2).to(dtype).mT)  # not contiguous
        results.append(y.detach())
    return results + [leaf.grad for leaf in (x, w, gate, up, gated) if leaf.grad is not None]


def experts(kernels: Fp8Kernels, scales: Fp8Scales, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of experts, one of them without rows."""
    counts = [130, 0, 5]
    shapes = [(sum(counts), 140), (3, 40, 140), (3, 40, 140), (3, 140, 40)]
    leaves = [normal(*shape, seed=i).div(4).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    for weight in leaves[1:]:
        weight.grad_dtype = torch.float32
    weights = normal(sum(counts), seed=9).sigmoid().requires_grad_()
    y = policy(scales, kernels).experts(*leaves, counts, weights)
    y.backward(normal(*y.shape, seed=10).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in (*leaves, weights) if leaf.grad is not None)]


def check_layers(scales: Fp8Scales, dtype: torch.dtype) -> None:
    for layer in (linear, experts):
        ours, theirs = (layer(kernels, scales, dtype) for kernels in (triton_kernels(), REFERENCE))
        assert len(ours) == (7 if layer is linear else 6)
        for mine, plain in zip(ours, theirs, strict=True):
            assert mine.dtype == plain.dtype
            check_close(mine, plain, exact=scales is Fp8Scales.power_of_two)


def check_close(mine: Tensor, plain: Tensor, *, exact: bool) -> None:
    """Within 1e-6 where the operands' codes are the same, which powers of two ensure (`exact`).

    FP32 scales and BF16 roundings depend on the last bit of what was computed before, which the order of
    summation changes: a few values then have the next code.
    """
    if exact:
        assert relative_error(mine, plain) <= 1e-6
    elif mine.numel():
        differ = (mine - plain).abs() > 1e-5 * plain.abs().max()
        assert differ.float().mean() <= 0.01
        assert relative_error(mine, plain) <= 5e-3


def check_experts_without_rows() -> None:
    rows, weights = torch.empty(0, 140, requires_grad=True), torch.empty(0, requires_grad=True)
    ws = [torch.ones(s, requires_grad=True) for s in [(2, 136, 140), (2, 136, 140), (2, 140, 136)]]
    y = policy(Fp8Scales.deepseek, triton_kernels()).experts(rows, *ws, [0, 0], weights)
    y.sum().backward()
    assert y.shape == (0, 140)
    assert all(w.grad is not None and not w.grad.any() for w in ws)


def model_gradients(kernels: Fp8Kernels, put_off: bool) -> dict[str, Tensor]:
    model = Transformer(small(num_layers=2, num_mtp_layers=1), compute=Compute.fp32)
    randomize(model, seed=0)
    later = WeightGradients()
    install_fp8(model, policy(Fp8Scales.power_of_two, kernels), later)
    install(model, later)
    tokens_BKS = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    output = model(tokens_BKS, torch.arange(12).expand(2, -1), balance_scale=0.5)
    loss = torch.stack([hidden.square().sum() for hidden in output.hidden_KBSD]).sum()
    if put_off:
        with later.put_off() as work:
            loss.backward()
        for product in work:
            product()
    else:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_model() -> None:
    """A difference of one rounding moves a value at a boundary to the next code: percents would be errors."""
    expected = model_gradients(REFERENCE, False)
    ours = model_gradients(triton_kernels(), True)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 2e-3, name


def test_quantisation(interpret: Interpret) -> None:
    interpret(check_quantisation)


def test_a_weight_is_not_copied(interpret: Interpret) -> None:
    interpret(check_a_weight_is_not_copied)


@pytest.mark.parametrize(
    ("scales", "dtype"), [(Fp8Scales.power_of_two, torch.float32), (Fp8Scales.deepseek, torch.bfloat16)]
)
def test_layers(interpret: Interpret, scales: Fp8Scales, dtype: torch.dtype) -> None:
    interpret(partial(check_layers, scales, dtype))


def test_experts_without_rows(interpret: Interpret) -> None:
    interpret(check_experts_without_rows)


@pytest.mark.slow
def test_a_whole_model_with_products_put_off(interpret: Interpret) -> None:
    interpret(check_model)
