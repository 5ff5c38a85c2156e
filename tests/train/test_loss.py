"""The objective against torch's cross-entropy on whole logits: value, every gradient, and additivity."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.transformer import ModelOutput
from train import loss as loss_module
from train.loss import Objective, depth_weights

B, S, D, V = 6, 17, 8, 23


def drawn(depths: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, head and labels; a different share of targets is ignored at every depth and row."""
    generator = torch.Generator().manual_seed(depths)
    hidden = [torch.randn(B, S, D, generator=generator, requires_grad=True) for _ in range(depths)]
    head_VD = torch.randn(V, D, generator=generator, requires_grad=True)
    labels_BKS = torch.randint(V, (B, depths, S), generator=generator)
    for row in range(B):
        for depth in range(depths):
            labels_BKS[row, depth, S - row - 2 * depth :] = -100
    return hidden, head_VD, labels_BKS


def output_of(hidden: list[Tensor]) -> ModelOutput:
    return ModelOutput(hidden, torch.zeros(0, 4, dtype=torch.int64), torch.zeros(()))


def valid(labels_BKS: Tensor) -> Tensor:
    return (labels_BKS != -100).sum((0, 2))


@pytest.mark.parametrize("depths", [1, 2, 4])
def test_value_and_gradients(depths: int) -> None:
    hidden, head_VD, labels_BKS = drawn(depths)
    result = Objective(head_VD)(output_of(hidden), labels_BKS, valid_K=valid(labels_BKS), mtp_weight=0.3)
    gradients = torch.autograd.grad(result.total, [*hidden, head_VD])

    losses = [
        F.cross_entropy((x_BSD @ head_VD.T).flatten(0, 1), labels_BKS[:, k].flatten(), ignore_index=-100)
        for k, x_BSD in enumerate(hidden)
    ]
    expected = losses[0]
    for mtp_loss in losses[1:]:
        expected = expected + 0.3 / (depths - 1) * mtp_loss
    torch.testing.assert_close(result.total, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, [*hidden, head_VD]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    means_K = result.loss_sums_K / valid(labels_BKS)
    torch.testing.assert_close(means_K, torch.stack(losses).detach(), rtol=1e-6, atol=0)
    assert not result.loss_sums_K.requires_grad
    assert result.loss_sums_K.dtype == torch.float32


@pytest.mark.parametrize("cuts", [[6], [3, 3], [1, 5], [1] * 6])
def test_microbatches_add_up_although_their_valid_counts_differ(cuts: list[int]) -> None:
    hidden, head_VD, labels_BKS = drawn(3)
    objective, valid_K = Objective(head_VD), valid(labels_BKS)
    whole = objective(output_of(hidden), labels_BKS, valid_K=valid_K, mtp_weight=0.3)
    parts = [
        objective(output_of([x[rows] for x in hidden]), labels_BKS[rows], valid_K=valid_K, mtp_weight=0.3)
        for rows in torch.arange(B).split(cuts)
    ]
    total = torch.stack([part.total for part in parts]).sum()
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=0)
    sums_K = torch.stack([part.loss_sums_K for part in parts]).sum(0)
    torch.testing.assert_close(sums_K, whole.loss_sums_K, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(total, [*hidden, head_VD]),
        torch.autograd.grad(whole.total, [*hidden, head_VD]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_one_cross_entropy_call_covers_all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = loss_module.linear_cross_entropy

    def counting(hidden_TD: Tensor, *args: Tensor, vocabulary: None) -> tuple[Tensor, Tensor]:
        calls.append(hidden_TD.shape[0])
        return kernel(hidden_TD, *args, vocabulary=vocabulary)

    monkeypatch.setattr(loss_module, "linear_cross_entropy", counting)
    hidden, head_VD, labels_BKS = drawn(3)
    Objective(head_VD)(output_of(hidden), labels_BKS, valid_K=valid(labels_BKS), mtp_weight=0.3)
    assert calls == [3 * B * S]


def test_loss_scale_scales_the_total_alone() -> None:
    hidden, head_VD, labels_BKS = drawn(2)
    objective, valid_K = Objective(head_VD), valid(labels_BKS)
    plain = objective(output_of(hidden), labels_BKS, valid_K=valid_K, mtp_weight=0.3)
    scaled = objective(output_of(hidden), labels_BKS, valid_K=valid_K, mtp_weight=0.3, loss_scale=1024.0)
    torch.testing.assert_close(scaled.total, plain.total * 1024, rtol=1e-6, atol=0)
    assert torch.equal(scaled.loss_sums_K, plain.loss_sums_K)


def test_fp16_gradients_do_not_underflow_under_a_scale() -> None:
    """1 / n_0 of a large batch is near FP16's smallest number; the scale must act before rounding to FP16."""
    hidden, head_VD, labels_BKS = drawn(1)
    valid_K = torch.tensor([1 << 24])  # as if this were one microbatch of many
    hidden_BSD = hidden[0].detach().half().requires_grad_()
    head_half_VD = head_VD.detach().half().requires_grad_()
    scale = 2.0**24
    result = Objective(head_half_VD)(
        output_of([hidden_BSD]), labels_BKS, valid_K=valid_K, mtp_weight=0.0, loss_scale=scale
    )
    (mine,) = torch.autograd.grad(result.total, [hidden_BSD])
    wide = [hidden_BSD.detach().float().requires_grad_()]
    exact = Objective(head_half_VD.detach().float())(
        output_of(wide), labels_BKS, valid_K=valid_K, mtp_weight=0.0
    )
    (theirs,) = torch.autograd.grad(exact.total, wide)
    torch.testing.assert_close(mine.float() / scale, theirs, rtol=2e-2, atol=2e-3 / (1 << 24))


def test_mtp_weight_zero_leaves_the_main_loss() -> None:
    hidden, head_VD, labels_BKS = drawn(3)
    both = Objective(head_VD)(output_of(hidden), labels_BKS, valid_K=valid(labels_BKS), mtp_weight=0.0)
    main = Objective(head_VD)(
        output_of(hidden[:1]), labels_BKS[:, :1], valid_K=valid(labels_BKS)[:1], mtp_weight=0.0
    )
    torch.testing.assert_close(both.total, main.total, rtol=1e-6, atol=0)


def test_a_depth_without_targets_is_left_out() -> None:
    hidden, head_VD, labels_BKS = drawn(2)
    labels_BKS[:, 1] = -100
    result = Objective(head_VD)(output_of(hidden), labels_BKS, valid_K=valid(labels_BKS), mtp_weight=0.3)
    assert result.loss_sums_K[1] == 0
    assert result.total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(result.total, [*hidden, head_VD]))


def test_depth_weights() -> None:
    weights_K = depth_weights(torch.tensor([100, 50, 25]), mtp_weight=0.3)
    torch.testing.assert_close(weights_K, torch.tensor([0.01, 0.15 / 50, 0.15 / 25]))
    assert depth_weights(torch.tensor([4]), mtp_weight=0.3).tolist() == [0.25]
