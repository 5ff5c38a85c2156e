"""One optimizer step's forward and backward passes: `schedule.step(batch)`, whatever the layout.

A schedule runs this process's sequences in microbatches. Nothing in it averages: gradients, losses, expert
loads add up, and the single division by the global number of valid tokens (for the balance loss: of
sequences) is inside the loss. So how the batch is cut, over microbatches or processes, never changes the
result. `LocalSchedule` is the loop over microbatches for a model that is not cut into pipeline stages;
parallel/pipeline has the others.

Legend: B sequences of this process (or of a microbatch), S tokens of a sequence that its tp ranks share,
K = 1 + MTP depths, L MoE layers of the whole model, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import ModelOutput, Transformer, moe_layer_names
from parallel.mesh import Mesh, single_process


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The part of one optimizer step's sequences that this process runs, on the model's device.

    Data-parallel ranks have different sequences; context-parallel ones different tokens of the same.
    """

    tokens_BKS: Tensor
    """Inputs, int64; [:, k, i] is token i + k of the sequence, which MTP depth k embeds."""
    labels_BKS: Tensor
    """Targets, int64; [:, k, i] is token i + k + 1, or -100 where nothing is to be predicted."""
    positions_BS: Tensor
    """Position of each token in its sequence, int64."""
    valid_K: Tensor
    """Targets that are not -100, per depth, over the whole global batch, int64."""
    global_sequences: int
    """Sequences of the whole global batch."""

    def __getitem__(self, rows: slice) -> "Batch":
        """Return some of the sequences, such as a microbatch."""
        return Batch(
            tokens_BKS=self.tokens_BKS[rows],
            labels_BKS=self.labels_BKS[rows],
            positions_BS=self.positions_BS[rows],
            valid_K=self.valid_K,
            global_sequences=self.global_sequences,
        )

    def microbatches(self, size: int) -> Iterator["Batch"]:
        """Return the sequences in microbatches of `size`; the last one may be smaller."""
        return (self[start : start + size] for start in range(0, len(self.tokens_BKS), size))


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
    """Tokens routed to each expert of each MoE layer of the whole model, exact, int64 [L, E]."""
    layers: tuple[str, ...]
    """The names of these layers."""

    def loads_of(self, names: Iterable[str]) -> Tensor:
        """Return the rows of some layers, in the order of `names`, int64 [len(names), E]."""
        return self.load_LE[[self.layers.index(name) for name in names]]


class Schedule(Protocol):
    """What runs the forward and backward passes of one optimizer step."""

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> StepOutput:
        """Add the gradient of the objective over `batch`, times `loss_scale`, to the parameters' gradients.

        Args:
            batch: this process's part of the global batch.
            mtp_weight: lambda of arXiv 2412.19437, equation 25, in this step.
            loss_scale: factor on everything that is differentiated; 1 unless computing in FP16.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LocalSums:
    """What this process's passes add to a step's totals; detached, nothing averaged."""

    loss_sums_K: Tensor
    """Cross-entropy over the targets seen here, FP64; zeros where the last part of the model is elsewhere."""
    balance_loss: Tensor
    """Over the layers and tokens held here, FP64 scalar."""
    loads: dict[str, Tensor]
    """Tokens routed from here to each expert, by MoE layer held here, int64 [E]."""

    @staticmethod
    def of(
        names: Sequence[str], outputs: Sequence[ModelOutput], losses: Sequence[MicrobatchLoss], depths: int
    ) -> "LocalSums":
        """Add up the microbatches of one part of the model, whose MoE layers are `names`, in order."""
        load_LE = torch.stack([output.load_LE for output in outputs]).sum(0)
        none = torch.zeros(depths, dtype=torch.float64, device=load_LE.device)
        return LocalSums(
            loss_sums_K=torch.stack([none, *(loss.loss_sums_K.double() for loss in losses)]).sum(0),
            balance_loss=torch.stack([output.balance_loss.double() for output in outputs]).sum(),
            loads=dict(zip(names, load_LE.unbind(0), strict=True)),
        )


def world_totals(sums: LocalSums, batch: Batch, config: ModelConfig, mesh: Mesh) -> StepOutput:
    """Return a step's totals, equal on every process; all processes call this together.

    Every routed token is counted by the one process that holds it. The tp ranks of a stage compute the same
    cross-entropy, so the first of them counts.
    """
    depths = batch.valid_K.numel()
    losses_K = sums.loss_sums_K if mesh.tp.rank == 0 else torch.zeros_like(sums.loss_sums_K)
    numbers = mesh.world.all_reduce(torch.cat([losses_K, sums.balance_loss.view(1)]))
    loss_sums_K, balance_loss = numbers[:depths], numbers[depths]
    no_load = torch.zeros(config.moe.num_experts, dtype=torch.int64, device=numbers.device)
    layers = tuple(moe_layer_names(config)[: _rows(config, depths)])
    rows = [sums.loads.get(name, no_load) for name in layers]
    load_LE = torch.stack(rows) if rows else no_load.new_zeros(0, len(no_load))
    return StepOutput(
        loss_sums_K=loss_sums_K.float(),
        mean_loss_K=(loss_sums_K / batch.valid_K.clamp(min=1)).float(),
        balance_loss=(balance_loss / batch.global_sequences).float(),
        load_LE=mesh.world.all_reduce(load_LE),
        layers=layers,
    )


def _rows(config: ModelConfig, depths: int) -> int:
    """Return how many MoE layers ran: MTP depths without tokens are left out."""
    return len(moe_layer_names(config)) - config.num_mtp_layers + depths - 1


class Passes(Protocol):
    """What runs the passes of one process and says what they add to the totals."""

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> LocalSums:
        """Do as `Schedule.step`, and return this process's sums."""
        ...


@dataclass(frozen=True, kw_only=True)
class WorldSchedule:
    """A `Schedule` from the passes of each process."""

    passes: Passes
    config: ModelConfig
    mesh: Mesh

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> StepOutput:
        """Run the passes and add up what all processes did; see `Schedule.step`."""
        sums = self.passes.step(batch, mtp_weight=mtp_weight, loss_scale=loss_scale)
        return world_totals(sums, batch, self.config, self.mesh)


class LocalSchedule:
    """Forward and backward of microbatch after microbatch, the whole depth of the model on this process.

    Args:
        model: all layers; its parameters' gradients must exist, backward adds to them.
        loss_function: the objective.
        microbatch_size: sequences that go through the model together; the last microbatch may be smaller.
        mesh: whose processes take part in the step.
    """

    def __init__(
        self,
        model: Transformer,
        loss_function: LossFunction,
        *,
        microbatch_size: int,
        mesh: Mesh | None = None,
    ) -> None:
        self._model = model
        self._loss_function = loss_function
        self._microbatch_size = microbatch_size
        self._mesh = mesh or single_process()

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> StepOutput:
        """Add the gradient of the objective over `batch`, times `loss_scale`, to the parameters' gradients.

        Args:
            batch: this process's part of the global batch.
            mtp_weight: lambda of arXiv 2412.19437, equation 25, in this step.
            loss_scale: factor on everything that is differentiated; 1 unless computing in FP16.
        """
        parts = [
            self._forward_backward(microbatch, mtp_weight=mtp_weight, loss_scale=loss_scale)
            for microbatch in batch.microbatches(self._microbatch_size)
        ]
        outputs, losses = [output for output, _ in parts], [loss for _, loss in parts]
        config, depths = self._model.config, batch.valid_K.numel()
        names = self._model.moe_layer_names()[: _rows(config, depths)]
        return world_totals(LocalSums.of(names, outputs, losses, depths), batch, config, self._mesh)

    def _forward_backward(
        self, batch: Batch, *, mtp_weight: float, loss_scale: float
    ) -> tuple[ModelOutput, MicrobatchLoss]:
        # A method of its own, so that one microbatch's activations are gone before the next one's forward.
        output = self._model(
            batch.tokens_BKS, batch.positions_BS, balance_scale=loss_scale / batch.global_sequences
        )
        loss = self._loss_function(
            output,
            batch.labels_BKS,
            valid_K=batch.valid_K,
            mtp_weight=mtp_weight,
            loss_scale=loss_scale,
        )
        loss.total.backward()
        counts = ModelOutput([], output.load_LE, output.balance_loss)
        return counts, MicrobatchLoss(total=loss.total.detach(), loss_sums_K=loss.loss_sums_K)
