"""The moving average against its closed form."""

import pytest
import torch

from train.ema import Ema


def test_constant_weights_after_n_updates() -> None:
    """From 0 towards 1: 1 - decay^n."""
    ema = Ema({"w": torch.zeros(3)}, decay=0.9)
    for n in range(1, 20):
        ema.update({"w": torch.ones(3)})
        torch.testing.assert_close(ema.averages()["w"], torch.full((3,), 1 - 0.9**n), rtol=1e-6, atol=0)


def test_weighted_sum_of_all_updates() -> None:
    torch.manual_seed(0)
    series = torch.randn(12, 4, 2)
    ema = Ema({"w": series[0]}, decay=0.75)
    for weights in series[1:]:
        ema.update({"w": weights})
    factors = torch.tensor([0.75**11] + [0.25 * 0.75 ** (11 - i) for i in range(1, 12)])
    expected = (factors[:, None, None] * series).sum(0)
    torch.testing.assert_close(ema.averages()["w"], expected, rtol=1e-5, atol=1e-6)


def test_average_is_fp32_and_owns_its_memory() -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}
    ema = Ema(weights, decay=0.999)
    weights["a"].add_(1)
    for tensor in ema.averages().values():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.ones(2))


def test_small_moves_are_not_lost_to_bf16() -> None:
    ema = Ema({"w": torch.ones(1)}, decay=0.9999)
    for _ in range(100):
        ema.update({"w": torch.full((1,), 2.0)})
    assert ema.averages()["w"].item() == pytest.approx(2 - 0.9999**100, rel=1e-6)


def test_writing_into_the_tensors_restores() -> None:
    ema, resumed = Ema({"w": torch.zeros(3)}, decay=0.5), Ema({"w": torch.full((3,), 7.0)}, decay=0.5)
    ema.update({"w": torch.ones(3)})
    resumed.averages()["w"].copy_(ema.averages()["w"])
    for average in (ema, resumed):
        average.update({"w": torch.full((3,), 3.0)})
    assert torch.equal(ema.averages()["w"], resumed.averages()["w"])


def test_other_names_are_refused() -> None:
    ema = Ema({"w": torch.zeros(3), "x": torch.zeros(1)}, decay=0.5)
    with pytest.raises(ValueError, match="differ in x, y"):
        ema.update({"w": torch.zeros(3), "y": torch.zeros(1)})
