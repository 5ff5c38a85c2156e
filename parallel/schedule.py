"""One optimizer step's forward and backward passes: `schedule.step(batch)`, whatever the layout.

`LocalSchedule` runs a global batch on one process as a loop over microbatches. Nothing in it averages:
gradients, losses, expert loads add up, and the single division by the global number of valid tokens
(for the balance loss: of sequences) is inside the loss. So how the batch is cut never changes the result.

Legend: B sequences of a microbatch, S sequence length, K = 1 + MTP depths, L MoE layers, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.transformer import ModelOutput, Transformer


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of one optimizer step, B of them, on the model's device."""

    tokens_BKS: Tensor
    """Inputs, int64; [:, k, i] is token i + k of the sequence, which MTP depth k embeds."""
    labels_BKS: Tensor
    """Targets, int64; [:, k, i] is token i + k + 1, or -100 where nothing is to be predicted."""
    positions_BS: Tensor
    """Position of each token in its sequence, int64."""
    valid_K: Tensor
    """Targets that are not -100, per depth, over the whole global batch, int64."""

    @property
    def num_sequences(self) -> int:
        """Return B."""
        return self.tokens_BKS.shape[0]

    @property
    def num_tokens(self) -> int:
        """Return B * S, the tokens by which schedules advance."""
        return self.positions_BS.numel()


@dataclass(frozen=True, kw_only=True)
class MicrobatchLoss:
    """What a loss function returns for one microbatch."""

    total: Tensor
    """Scalar to differentiate: this microbatch's share of the global objective times the loss scale."""
    loss_sums_K: Tensor
    """Cross-entropy summed over the microbatch's valid targets, per depth, detached, unscaled."""


class LossFunction(Protocol):
    """The objective, injected from above: hidden states and labels of one microbatch to its loss."""

    def __call__(
        self,
        output: ModelOutput,
        labels_BKS: Tensor,
        *,
        valid_K: Tensor,
        mtp_weight: float,
        loss_scale: float,
    ) -> MicrobatchLoss:
        """Return the microbatch's share of the objective, normalised by the global counts `valid_K`."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one step's passes yield beside gradients; everything is detached and covers the global batch."""

    loss_sums_K: Tensor
    """Cross-entropy summed over all valid targets: main model first, then each MTP depth; FP32 [K]."""
    mean_loss_K: Tensor
    """The same per valid target, as in the objective; FP32 [K]."""
    balance_loss: Tensor
    """Balance loss summed over layers, averaged over sequences, as in the objective; FP32 scalar."""
    load_LE: Tensor
    """Tokens routed to each expert of each MoE layer, exact, int64 [L, E]."""


@dataclass(frozen=True)
class _Microbatch:
    """The sequences that go through the model together, and what they yielded."""

    loss_sums_K: Tensor
    balance_loss: Tensor
    load_LE: Tensor


class LocalSchedule:
    """Forward and backward of microbatch after microbatch on one process.

    Args:
        model: the whole model; its parameters' gradients must exist, backward adds to them.
        loss_function: the objective.
        microbatch_size: sequences that go through the model together; the last microbatch may be smaller.
    """

    def __init__(self, model: Transformer, loss_function: LossFunction, *, microbatch_size: int) -> None:
        self._model = model
        self._loss_function = loss_function
        self._microbatch_size = microbatch_size

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> StepOutput:
        """Add the gradient of the objective over `batch`, times `loss_scale`, to the parameters' gradients.

        Args:
            batch: the global batch.
            mtp_weight: lambda of arXiv 2412.19437, equation 25, in this step.
            loss_scale: factor on everything that is differentiated; 1 unless computing in FP16.
        """
        parts = [
            self._forward_backward(batch, rows, mtp_weight=mtp_weight, loss_scale=loss_scale)
            for rows in self._cuts(batch)
        ]
        loss_sums_K = torch.stack([part.loss_sums_K for part in parts]).sum(0)
        return StepOutput(
            loss_sums_K=loss_sums_K.float(),
            mean_loss_K=(loss_sums_K / batch.valid_K.clamp(min=1)).float(),
            balance_loss=torch.stack([part.balance_loss for part in parts]).sum() / batch.num_sequences,
            load_LE=torch.stack([part.load_LE for part in parts]).sum(0),
        )

    def _cuts(self, batch: Batch) -> Iterator[slice]:
        for start in range(0, batch.num_sequences, self._microbatch_size):
            yield slice(start, start + self._microbatch_size)

    def _forward_backward(
        self, batch: Batch, rows: slice, *, mtp_weight: float, loss_scale: float
    ) -> _Microbatch:
        # A method of its own, so that one microbatch's activations are gone before the next one's forward.
        output = self._model(
            batch.tokens_BKS[rows],
            batch.positions_BS[rows],
            balance_scale=loss_scale / batch.num_sequences,
        )
        loss = self._loss_function(
            output,
            batch.labels_BKS[rows],
            valid_K=batch.valid_K,
            mtp_weight=mtp_weight,
            loss_scale=loss_scale,
        )
        loss.total.backward()
        return _Microbatch(loss.loss_sums_K.double(), output.balance_loss.detach(), output.load_LE)
