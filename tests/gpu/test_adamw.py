"""Transformer Engine's kernel for AdamW on a GPU, against torch's: the same state, step after step.

pytest -m gpu tests/gpu
"""

import pytest
import torch

from model.config import Gemm
from tests.model.small import relative
from train.adamw import FlatState, update_flat
from train.config import AdamKernel, Moments, OptimizerConfig
from train.machine import find_machine
from train.requirements import kernel_problems

pytestmark = pytest.mark.gpu

SIZE, STEPS = 3 * (1 << 24) + 77, 3
"""More than two chunks, and no multiple of anything."""


def update(config: OptimizerConfig, device: str = "cuda", size: int = SIZE) -> FlatState:
    """Return weights and moments after some steps."""
    dtype = torch.bfloat16 if config.moments is Moments.bf16 else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(size, generator=generator, device=device)
    exp_avg, exp_avg_sq = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
    state = FlatState(weights, torch.empty_like(weights), exp_avg, exp_avg_sq)
    for step in range(1, STEPS + 1):
        state.gradient.normal_(std=step, generator=generator)
        for _ in update_flat(state, config, num_updates=step, lr=1e-3, decay=True):
            pass
    return state


@pytest.mark.parametrize("moments", Moments)
def test_the_same_state(moments: Moments) -> None:
    """FP32 throughout: 1e-6; a BF16 moment on the border of two values may round either way."""
    ours = OptimizerConfig(kernel=AdamKernel.transformer_engine, moments=moments)
    if problems := kernel_problems(ours, find_machine(Gemm.compute, ours.kernel, device="cuda")):
        pytest.skip("; ".join(problems))
    mine, plain = update(ours), update(OptimizerConfig(moments=moments))
    assert relative(mine.weights, plain.weights) < (1e-6 if moments is Moments.fp32 else 1e-5)
    for moment, expected in zip(mine[2:], plain[2:], strict=True):
        if moments is Moments.fp32:
            assert relative(moment, expected) < 1e-6
        else:
            assert (moment == expected).float().mean() > 0.99
            assert relative(moment.float(), expected.float()) < 1e-3
