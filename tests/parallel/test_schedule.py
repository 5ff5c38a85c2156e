"""How a batch is cut never changes what a step computes: gradients, losses, counts, bias update.

The loads exceed 256 per expert, so a count kept in BF16 would be rounded; the rows have unequal numbers of
valid targets, so an average of microbatch averages would be wrong.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import AttentionConfig, ModelConfig, MoEConfig, Recompute
from model.init import initialize
from model.transformer import ModelOutput, Transformer
from parallel.bucket import ParameterRule
from parallel.schedule import Batch, LocalSchedule, StepOutput
from parallel.zero1 import Zero1
from train.balance import update_router_biases
from train.batch import IGNORED_LABEL, make_batch
from train.loss import Objective

CPU = torch.device("cpu")
SEQUENCES, SEQ_LEN, DEPTH = 8, 160, 2
CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=24,
    num_layers=2,
    num_dense_layers=1,
    dense_intermediate_size=40,
    attention=AttentionConfig(
        num_heads=2,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    moe=MoEConfig(
        num_experts=4,
        num_shared_experts=1,
        top_k=2,
        intermediate_size=16,
        num_groups=2,
        top_k_groups=2,
        balance_loss_weight=0.05,
    ),
    num_mtp_layers=DEPTH,
    init_std=0.2,
)


def batch() -> Batch:
    rows_BW = torch.randint(53, (SEQUENCES, SEQ_LEN + 1 + DEPTH), generator=torch.Generator().manual_seed(5))
    for row in range(SEQUENCES):
        rows_BW[row, SEQ_LEN - 11 * row :] = IGNORED_LABEL
    return make_batch(rows_BW, num_mtp_layers=DEPTH, device=CPU)


class Run:
    """One step of a freshly built model."""

    def __init__(
        self,
        microbatch_size: int,
        *,
        recompute: Recompute = Recompute.none,
        loss_scale: float = 1.0,
        mtp_weight: float = 0.3,
    ) -> None:
        self.model = Transformer(CONFIG, recompute=recompute)
        initialize(self.model, seed=3)
        self.engine = Zero1(
            self.model.named_parameters(), rule=lambda name, p: ParameterRule(decay=True, lr_multiplier=1.0)
        )
        schedule = LocalSchedule(
            self.model, Objective(self.model.head.weight), microbatch_size=microbatch_size
        )
        self.output: StepOutput = schedule.step(batch(), mtp_weight=mtp_weight, loss_scale=loss_scale)
        update_router_biases(self.model.routers(), self.output.load_LE, speed=0.001)

    def gradients(self) -> dict[str, Tensor]:
        return self.engine.named_views([bucket.grad for bucket in self.engine.buckets])

    def biases(self) -> list[Tensor]:
        return [router.bias for router in self.model.routers().values()]


@pytest.fixture(scope="module")
def whole() -> Run:
    """The batch in one piece."""
    return Run(SEQUENCES)


def assert_same_gradients(run: Run, whole: Run, factor: float = 1.0) -> None:
    expected = whole.gradients()
    for name, gradient in run.gradients().items():
        size = expected[name].abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(
            gradient / factor,
            expected[name],
            rtol=0,
            atol=1e-6 * max(size, 1.0),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_counts(run: Run, whole: Run) -> None:
    assert run.output.load_LE.dtype == torch.int64
    assert torch.equal(run.output.load_LE, whole.output.load_LE)
    for mine, theirs in zip(run.biases(), whole.biases(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("microbatch_size", [4, 3, 1, 100])
def test_accumulation_changes_nothing(microbatch_size: int, whole: Run) -> None:
    run = Run(microbatch_size)
    assert_same_gradients(run, whole)
    assert_same_counts(run, whole)
    for mine, theirs in (
        (run.output.loss_sums_K, whole.output.loss_sums_K),
        (run.output.mean_loss_K, whole.output.mean_loss_K),
        (run.output.balance_loss, whole.output.balance_loss),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recompute", [Recompute.deepseek, Recompute.core, Recompute.full])
def test_recomputation_counts_no_token_twice(recompute: Recompute, whole: Run) -> None:
    run = Run(2, recompute=recompute)
    assert_same_gradients(run, whole)
    assert_same_counts(run, whole)


def test_loads_count_every_choice_of_every_token(whole: Run) -> None:
    load_LE = whole.output.load_LE
    assert load_LE.shape == (1 + DEPTH, 4)
    assert load_LE.sum(1).tolist() == [SEQUENCES * SEQ_LEN * 2] * (1 + DEPTH)
    # beyond 256 BF16 holds not every integer, and these loads are indeed such
    assert not torch.equal(load_LE.bfloat16().long(), load_LE)
    assert any(bias.any() for bias in whole.biases())


def test_loads_are_found_by_the_layers_name(whole: Run) -> None:
    """A pipeline rank asks for its own layers, which are neither the first ones nor in a row."""
    layers, load_LE = whole.output.layers, whole.output.load_LE
    assert not torch.equal(load_LE[0], load_LE[2])
    assert torch.equal(whole.output.loads_of([layers[2], layers[0]]), load_LE[[2, 0]])


def test_gradients_and_losses_equal_plain_autograd(whole: Run) -> None:
    """The objective written out on whole logits, with means instead of sums over global counts."""
    model = Transformer(CONFIG)
    initialize(model, seed=3)
    data = batch()
    output = model(data.tokens_BKS, data.positions_BS, balance_scale=1 / SEQUENCES)
    losses = [
        F.cross_entropy(
            (hidden_BSD @ model.head.weight.T).flatten(0, 1),
            data.labels_BKS[:, k].flatten(),
            ignore_index=IGNORED_LABEL,
        )
        for k, hidden_BSD in enumerate(output.hidden_KBSD)
    ]
    (losses[0] + 0.3 / DEPTH * (losses[1] + losses[2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(whole.gradients()[name], parameter.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.output.mean_loss_K, torch.stack(losses).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.output.balance_loss, output.balance_loss / SEQUENCES, rtol=1e-6, atol=0)


def test_balance_loss_reaches_the_gates(whole: Run) -> None:
    """It is small, so its absence would pass a loose comparison of other gradients."""
    without = Run(SEQUENCES)
    without.engine.zero_grad()
    data = batch()
    output = without.model(data.tokens_BKS, data.positions_BS)
    Objective(without.model.head.weight)(
        output, data.labels_BKS, valid_K=data.valid_K, mtp_weight=0.3
    ).total.backward()
    gate = "layers.1.ffn.gate.weight"
    assert (without.gradients()[gate] - whole.gradients()[gate]).norm() > 1e-4


def test_loss_scale_scales_every_gradient_and_no_loss(whole: Run) -> None:
    run = Run(3, loss_scale=1024.0)
    assert_same_gradients(run, whole, factor=1024.0)
    torch.testing.assert_close(run.output.loss_sums_K, whole.output.loss_sums_K, rtol=1e-6, atol=0)
    torch.testing.assert_close(run.output.balance_loss, whole.output.balance_loss, rtol=1e-6, atol=0)


def test_gradients_of_two_steps_add_up(whole: Run) -> None:
    run = Run(4)
    schedule = LocalSchedule(run.model, Objective(run.model.head.weight), microbatch_size=2)
    for router in run.model.routers().values():
        router.bias.zero_()
    schedule.step(batch(), mtp_weight=0.3)
    assert_same_gradients(run, whole, factor=2.0)


def broken(change: Callable[[ModelOutput], ModelOutput]) -> Callable[..., ModelOutput]:
    forward = Transformer.forward

    def changed(self: Transformer, *args: Tensor, **kwargs: float) -> ModelOutput:
        return change(forward(self, *args, **kwargs))

    return changed


def test_the_comparison_notices_bf16_counts(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(output: ModelOutput) -> ModelOutput:
        return ModelOutput(output.hidden_KBSD, output.load_LE.bfloat16().long(), output.balance_loss)

    monkeypatch.setattr(Transformer, "forward", broken(rounded))
    with pytest.raises(AssertionError):
        assert_same_counts(Run(4), whole)
