"""What one device reaches in matrix products, attention and memory, at the shapes of DeepSeek-V3.

The shapes are those of arXiv 2412.19437, section 4.2; on a CPU they are an eighth as wide, so that a run
takes milliseconds. Products are those of the feed-forward of a dense layer and of attention's wide
projections, [M, K] [K, N] as (M, K, N); the rate is the FLOPs of all over the time of all. Attention has
heads with keys of 192 and values of 128 channels and is causal: half of the scores count, and a backward pass
counts as 2.5 forward passes, as parallel/cluster.py says. Memory is the sum of two vectors into a third:
three vectors cross the bus.

Legend: M rows, K summed over, N columns; B sequences, S tokens, H heads, D channels of keys, U of values.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from launch.calibrate.rate import Rate
from model.kernels.attention import causal_attention
from parallel.preflight.timing import repeated_seconds

PRODUCTS = {
    "cuda": [(4096, 7168, 18432), (4096, 18432, 7168), (4096, 16384, 7168), (4096, 1536, 24576)],
    "cpu": [(512, 896, 2304), (512, 2304, 896), (512, 2048, 896), (512, 192, 3072)],
}
ATTENTION = {"cuda": (1, 4096, 128), "cpu": (1, 512, 16)}
KEY_CHANNELS, VALUE_CHANNELS = 192, 128
VECTOR = {"cuda": 1 << 28, "cpu": 1 << 23}
BACKWARD_FORWARDS = 2.5
FP8_CAPABILITY = (9, 0)
"""The first NVIDIA architecture whose tensor cores take the FP8 codes of model/kernels/triton."""


def compute_rates(device: torch.device) -> Iterator[Rate]:
    """Measure everything that the device can do alone."""
    yield product_rate("gemm_bf16", torch.bfloat16, device)
    yield product_rate("gemm_fp32", torch.float32, device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        yield fp8_rate(device)
    yield from attention_rates(device)
    yield memory_rate(device)


def product_rate(name: str, dtype: torch.dtype, device: torch.device) -> Rate:
    """Measure products of random matrices of one type; FP32 as torch is set to do it."""
    pairs = [
        (_random(M, K, dtype=dtype, device=device), _random(K, N, dtype=dtype, device=device))
        for M, K, N in PRODUCTS[device.type]
    ]

    def work() -> None:
        for a_MK, b_KN in pairs:
            torch.mm(a_MK, b_KN)

    return _products(name, work, device)


def fp8_rate(device: torch.device) -> Rate:
    """Measure products of block-quantised matrices: tiles of 1 × 128 against blocks of 128 × 128."""
    # imported here: Triton's kernels are of no use, and may be absent, where there is no accelerator
    from model.kernels.triton.gemm import block_scaled_mm
    from model.kernels.triton.quantize import quantize

    pairs = [
        (
            quantize(_random(M, K, dtype=torch.bfloat16, device=device), (1, 128), power_of_two=False),
            quantize(_random(N, K, dtype=torch.bfloat16, device=device), (128, 128), power_of_two=False),
        )
        for M, K, N in PRODUCTS[device.type]
    ]

    def work() -> None:
        for a_MK, b_NK in pairs:
            block_scaled_mm(a_MK, b_NK, dtype=torch.bfloat16)

    return _products("gemm_fp8", work, device)


def attention_rates(device: torch.device) -> Iterator[Rate]:
    """Measure the forward and the backward pass of causal attention in BF16."""
    B, S, H = ATTENTION[device.type]
    channels = (KEY_CHANNELS, KEY_CHANNELS, VALUE_CHANNELS)
    q_BSHD, k_BSHD, v_BSHU = inputs = [
        _random(B, S, H, width, dtype=torch.bfloat16, device=device).requires_grad_() for width in channels
    ]
    scale = KEY_CHANNELS**-0.5
    flops = B * H * S * S * (KEY_CHANNELS + VALUE_CHANNELS)
    what = f"{B} × {S} tokens, {H} heads"

    def forward() -> Tensor:
        return causal_attention(q_BSHD, k_BSHD, v_BSHU, scale=scale)

    out_BSHU = forward()
    grad_BSHU = torch.ones_like(out_BSHU)

    def backward() -> object:
        return torch.autograd.grad(out_BSHU, inputs, grad_BSHU, retain_graph=True)

    for name, work, passes in (
        ("attention_forward", forward, 1.0),
        ("attention_backward", backward, BACKWARD_FORWARDS),
    ):
        seconds = repeated_seconds(work, device)
        yield Rate(name=name, what=what, unit="FLOP", work=passes * flops, seconds=seconds)


def memory_rate(device: torch.device) -> Rate:
    """Measure z = x + y on FP32 vectors that no cache holds."""
    count = VECTOR[device.type]
    x, y = torch.ones(count, device=device), torch.ones(count, device=device)
    z = torch.empty_like(x)
    seconds = repeated_seconds(lambda: torch.add(x, y, out=z), device)
    num_bytes = 3 * count * x.element_size()
    return Rate(name="memory", what=f"{num_bytes / 1e6:.0f} MB", unit="B", work=num_bytes, seconds=seconds)


def _products(name: str, work: Callable[[], None], device: torch.device) -> Rate:
    shapes = PRODUCTS[device.type]
    flops = sum(2 * M * K * N for M, K, N in shapes)
    what = ", ".join(f"{M}×{K}×{N}" for M, K, N in shapes)
    return Rate(name=name, what=what, unit="FLOP", work=flops, seconds=repeated_seconds(work, device))


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # zeros would need less power, and so run at higher clocks than any training does
    return torch.randn(*shape, device=device).to(dtype)
