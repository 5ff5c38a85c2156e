"""The FP8 backends on a GPU against the reference on the same GPU: layers, and a model over two steps.

    pytest -m gpu tests/gpu

Skipped without a device of compute capability 9.0, and for Transformer Engine without what that needs. Scales
are powers of two, so that operands have the same codes. `fp8_triton`, in FP32 elsewhere, then differs by the
order of summation. Transformer Engine computes in BF16, and quantises the activations of weight gradients and
SwiGLU's output from other numbers (model/backends/te.py): of these the difference is that of FP8 itself.
"""

import pytest
import torch
from torch import Tensor

from model.config import Compute, Fp8Scales, Gemm, PrecisionConfig
from model.experts import Experts
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from tests.model.oracle import randomize
from tests.model.small import relative, small
from train.machine import find_machine
from train.precision import WeightCodes, install_backend
from train.requirements import machine_problems

pytestmark = pytest.mark.gpu

SIZES: dict[str, object] = {
    "hidden_size": 256,
    "num_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 112,  # with the rotary keys, 128 outputs
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "dense_intermediate_size": 384,
    "intermediate_size": 128,
}
S, STEPS, MICROBATCHES, WIDTH = 64, 2, 2, 256
BACKENDS = [Gemm.fp8_triton, Gemm.fp8_te]
COMPUTE = {Gemm.fp8_triton: Compute.fp32, Gemm.fp8_te: Compute.bf16}


def precision(gemm: Gemm) -> PrecisionConfig:
    return PrecisionConfig(gemm=gemm, fp8_scales=Fp8Scales.power_of_two)


def need(gemm: Gemm) -> None:
    problems = machine_problems(precision(gemm), find_machine(gemm, device="cuda"))
    if problems:
        pytest.skip("; ".join(problems))


def make(
    gemm: Gemm, compute: Compute, device: str, **sizes: object
) -> tuple[Transformer, WeightGradients, list[WeightCodes]]:
    model = Transformer(small(**SIZES | sizes), compute=compute)
    randomize(model, seed=0)
    model.to(device)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    later = WeightGradients()
    codes = install_backend([model], precision(gemm), later)
    install(model, later)
    return model, later, codes


def normal(device: str, compute: Compute, *shape: int, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, torch.bfloat16 if compute is Compute.bf16 else torch.float32)


def layers(gemm: Gemm, compute: Compute, device: str = "cuda") -> list[dict[str, Tensor]]:
    """Return results of a linear map and of experts, one of them without rows."""
    model, _, _ = make(gemm, compute, device)
    (experts,) = (m for name, m in model.named_modules() if name == "layers.1.ffn.experts")
    assert isinstance(experts, Experts)
    wo = model.layers["0"].attn.wo
    x = normal(device, compute, 2, 100, wo.weight.shape[1], seed=1).requires_grad_()
    counts = [130, 0, 5, 128, 1, 256, 40, 7]
    rows = normal(device, compute, sum(counts), WIDTH, seed=2).requires_grad_()
    weights = torch.rand(sum(counts), generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    stacks = (experts.w1, experts.w3, experts.w2)
    results = []
    for y, leaves in (
        (wo.gemm(x, wo.weight), {"x": x, "weight": wo.weight}),
        (
            experts.feed_forward(rows, *stacks, counts, weights),
            {"rows": rows, "row weights": weights} | dict(zip(("w1", "w3", "w2"), stacks, strict=True)),
        ),
    ):
        y.backward(normal(device, compute, *y.shape, seed=4))
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        assert gradients.keys() == leaves.keys()
        results.append({"y": y.detach()} | gradients)
    return results


def steps(
    gemm: Gemm, compute: Compute, *, put_off: bool = False, device: str = "cuda"
) -> list[dict[str, Tensor]]:
    """Return the FP32 gradients of two plain steps of two microbatches; no experts, whose choice may flip."""
    model, later, codes = make(gemm, compute, device, num_dense_layers=3)
    found = []
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros(parameter.shape, device=device)
        for each in codes:
            each.forget()
        waiting = []
        for microbatch in range(MICROBATCHES):
            seed = 10 * step + microbatch
            tokens_BKS = torch.randint(64, (2, 1, S), generator=torch.Generator().manual_seed(seed)).to(
                device
            )
            output = model(tokens_BKS, torch.arange(S, device=device).expand(2, -1))
            (hidden_BSD,) = output.hidden_KBSD
            loss = (hidden_BSD.float() * normal(device, Compute.fp32, *hidden_BSD.shape, seed=seed)).sum()
            if not put_off:
                loss.backward()
                continue
            with later.put_off() as work:
                loss.backward()
            waiting += work
        for product in waiting:
            product()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: gradient.clone() for name, gradient in gradients.items()})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= (1e-5 * gradients[name]).to(parameter.dtype)
    return found


@pytest.mark.parametrize("gemm", BACKENDS)
def test_layers(gemm: Gemm) -> None:
    need(gemm)
    for mine, plain in zip(
        layers(gemm, COMPUTE[gemm]), layers(Gemm.fp8_reference, COMPUTE[gemm]), strict=True
    ):
        for name, result in mine.items():
            assert result.dtype == plain[name].dtype
            exact = 1e-6 if gemm is Gemm.fp8_triton else 5e-3 if name in ("y", "x") and "x" in mine else 0.06
            assert relative(result, plain[name]) < exact, name


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("gemm", BACKENDS)
def test_two_steps(gemm: Gemm, put_off: bool) -> None:
    """A rounding that moves a value to the next code is felt by all that follows: bands."""
    need(gemm)
    expected, ours = steps(Gemm.fp8_reference, COMPUTE[gemm]), steps(gemm, COMPUTE[gemm], put_off=put_off)
    for theirs, mine in zip(expected, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            assert relative(gradient, theirs[name]) < (5e-3 if gemm is Gemm.fp8_triton else 0.3), name


@pytest.mark.parametrize("shape", [(4096, 7168, 2048), (4096, 2048, 7168), (300, 576, 192)])
def test_triton_products(shape: tuple[int, int, int]) -> None:
    """The three products of a linear map, rows × width × outputs: codes bit for bit, products within 1e-6."""
    need(Gemm.fp8_triton)
    from model.backends.kernels import REFERENCE
    from model.backends.triton import TritonKernels
    from model.kernels.fp8 import SQUARE
    from tests.model.kernels.compare import relative_error
    from tests.model.kernels.triton.checks import check_same

    (rows, width, outputs), triton = shape, TritonKernels()
    sizes = [(rows, width), (outputs, width), (rows, outputs)]
    x, w, dy = (normal("cuda", Compute.fp32, *size, seed=seed) for seed, size in enumerate(sizes))
    made = []
    for kernels in (triton, REFERENCE):
        tiles = [*kernels.quantize_both(x, power_of_two=True), *kernels.quantize_both(dy, power_of_two=True)]
        made.append([*tiles, kernels.quantize(w, SQUARE, power_of_two=True)])
    for mine, plain in zip(*made, strict=True):
        check_same(mine, plain)
    x_rows, x_columns, dy_rows, dy_columns, w_blocks = made[0]
    for a, b in ((x_rows, w_blocks), (dy_rows, w_blocks.T), (dy_columns.T, x_columns.T)):
        mine, plain = (k.block_scaled_mm(a, b, dtype=torch.float32) for k in (triton, REFERENCE))
        assert relative_error(mine, plain) < 1e-6
