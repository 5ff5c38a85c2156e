"""Runs one rank's part of an action table: `schedule.step(batch)` for a model that is cut into stages.

The table says what to do in which order (parallel/pipeline/actions.py); here is how each action is done. As
in `LocalSchedule` nothing averages: every microbatch's share of the objective is normalised by global counts,
so gradients add up whatever the order.

Legend: B sequences, S tokens of a sequence that its tp ranks share, s those of one of them, D hidden, K = 1 +
MTP depths, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.transformer import ModelOutput, Transformer
from model.weight_gradients import WeightGradients, Work
from parallel.groups import Group
from parallel.pipeline.chunk import MicrobatchObjective, Pass, in_one_go
from parallel.pipeline.mail import Mail, Way
from parallel.pipeline.overlap import in_phases
from parallel.pipeline.table import Action, ActionKind, ActionTable
from parallel.pipeline.turns import Turns, alternate, finish
from parallel.schedule import Batch, LocalSums, LossFunction, MicrobatchLoss

_Key = tuple[int, int]
"""Stage and microbatch."""


class PipelineSchedule:
    """Forward and backward of all microbatches through the stages that this rank holds.

    Args:
        chunks: the parts of the model held here, by stage; their parameters' gradients must exist.
        table: the actions of a step, from its number of microbatches.
        pp: the ranks of the pipeline.
        loss_function: the objective; used where the last stage is.
        microbatch_size: sequences that go through the model together; the last microbatch may be smaller.
        weight_gradients: what the matrix products of `chunks` were installed with.
        on_reduce: called with a stage when its gradients are complete on this rank.
        overlap: whether a forward and a backward pass that the table joins hide each other's exchanges.
        tokens_per_share: devices over which the tokens of a sequence are spread between layers (tp).

    Whoever stands in `listeners` is called with each action before it is done.
    """

    def __init__(
        self,
        chunks: dict[int, Transformer],
        table: Callable[[int], ActionTable],
        *,
        pp: Group,
        loss_function: LossFunction,
        microbatch_size: int,
        weight_gradients: WeightGradients,
        on_reduce: Callable[[int], None],
        overlap: bool,
        tokens_per_share: int = 1,
    ) -> None:
        self.chunks, self.pp = chunks, pp
        self.weight_gradients, self.on_reduce = weight_gradients, on_reduce
        self.run = in_phases if overlap else in_one_go
        self.tokens_per_share = tokens_per_share
        self.listeners: list[Callable[[Action], None]] = []
        self._table = table
        self._loss_function, self._microbatch_size = loss_function, microbatch_size

    def step(self, batch: Batch, *, mtp_weight: float = 0.0, loss_scale: float = 1.0) -> LocalSums:
        """Add the gradient of the objective over `batch`, times `loss_scale`, to the parameters' gradients.

        Returns what this rank's stages add to the step's totals. All ranks of the pipeline call this
        together, with the same sequences. An exception carries a note that names rank and action.

        Args:
            batch: this process's part of the global batch.
            mtp_weight: lambda of arXiv 2412.19437, equation 25, in this step.
            loss_scale: factor on everything that is differentiated; 1 unless computing in FP16.
        """

        def objective(output: ModelOutput, microbatch: Batch) -> MicrobatchLoss:
            return self._loss_function(
                output,
                microbatch.labels_BKS,
                valid_K=microbatch.valid_K,
                mtp_weight=mtp_weight,
                loss_scale=loss_scale,
            )

        microbatches = list(batch.microbatches(self._microbatch_size))
        step = _Step(
            self,
            self._table(len(microbatches)),
            microbatches,
            objective=objective,
            balance_scale=loss_scale / batch.global_sequences,
        )
        return step.run()


class _Step:
    """One step on one rank: the passes under way, their mail, and what they have yielded so far."""

    def __init__(
        self,
        schedule: PipelineSchedule,
        table: ActionTable,
        microbatches: list[Batch],
        *,
        objective: MicrobatchObjective,
        balance_scale: float,
    ) -> None:
        self._schedule, self._table, self._microbatches = schedule, table, microbatches
        self._objective, self._balance_scale = objective, balance_scale
        self._mail = Mail(schedule.pp, table.stage_to_rank)
        self._passes: dict[_Key, Pass] = {}
        self._work: dict[_Key, list[Work]] = {}
        self._outputs: dict[int, list[ModelOutput]] = {stage: [] for stage in schedule.chunks}
        self._losses: list[MicrobatchLoss] = []

    def run(self) -> LocalSums:
        """Do everything that the table lists for this rank."""
        rank = self._schedule.pp.rank
        for action in self._table.actions[rank]:
            with _named(f"pipeline rank {rank}, action {action}"):
                for listener in self._schedule.listeners:
                    listener(action)
                self._do(action)
        self._mail.close()
        return self._sums()

    def _do(self, action: Action) -> None:
        stage, microbatch = key = action.stage, action.microbatch
        match action.kind:
            case ActionKind.FORWARD:
                finish(self._forward(action))
            case ActionKind.BACKWARD:
                finish(self._backward(action))
            case ActionKind.BACKWARD_INPUT:
                with self._schedule.weight_gradients.put_off() as self._work[key]:
                    finish(self._backward(action))
            case ActionKind.BACKWARD_WEIGHT:
                for product in self._work.pop(key):
                    product()
            case ActionKind.OVERLAP:
                forward, backward = action.parts
                alternate(self._forward(forward), self._backward(backward))
            case ActionKind.SEND_FORWARD:
                self._mail.send(Way.forward, stage, microbatch)
            case ActionKind.SEND_BACKWARD:
                self._mail.send(Way.backward, stage, microbatch)
            case ActionKind.RECEIVE_FORWARD:
                self._mail.receive(Way.forward, stage, microbatch, into=self._empty_hidden(action))
            case ActionKind.RECEIVE_BACKWARD:
                self._mail.receive(Way.backward, stage, microbatch, into=self._empty_hidden(action))
            case ActionKind.REDUCE_GRAD:
                self._schedule.on_reduce(stage)

    def _forward(self, action: Action) -> Turns[None]:
        stage, microbatch = action.stage, action.microbatch
        hidden_BsD = self._mail.take(Way.forward, stage, microbatch) if stage > 0 else None
        one = self._passes[stage, microbatch] = Pass(
            self._schedule.chunks[stage],
            self._microbatches[microbatch],
            objective=self._objective,
            balance_scale=self._balance_scale,
            run=self._schedule.run,
        )
        hidden_BsD = yield from one.forward(hidden_BsD)
        if one.output is not None:
            self._outputs[stage].append(one.output)
        if one.loss is not None:
            self._losses.append(one.loss)
        if hidden_BsD is not None:
            self._mail.put(Way.forward, stage, microbatch, hidden_BsD)

    def _backward(self, action: Action) -> Turns[None]:
        stage, microbatch = action.stage, action.microbatch
        is_last = stage == self._table.num_stages - 1
        gradient_BsD = None if is_last else self._mail.take(Way.backward, stage, microbatch)
        gradient_BsD = yield from self._passes.pop((stage, microbatch)).backward(gradient_BsD)
        if gradient_BsD is not None:
            self._mail.put(Way.backward, stage, microbatch, gradient_BsD)

    def _empty_hidden(self, action: Action) -> Tensor:
        """Return room for hidden states, or their gradient, between two stages."""
        chunk = self._schedule.chunks[action.stage]
        positions_BS = self._microbatches[action.microbatch].positions_BS
        shape = (
            positions_BS.shape[0],
            positions_BS.shape[1] // self._schedule.tokens_per_share,
            chunk.config.hidden_size,
        )
        return torch.empty(shape, dtype=chunk.dtype, device=positions_BS.device)

    def _sums(self) -> LocalSums:
        depths = self._microbatches[0].valid_K.numel()
        parts = []
        for stage, outputs in self._outputs.items():
            names = self._schedule.chunks[stage].moe_layer_names()
            ran = names[: len(outputs[0].load_LE)]  # MTP depths without tokens did not, and come last
            losses = self._losses if stage == self._table.num_stages - 1 else []
            parts.append(LocalSums.of(ran, outputs, losses, depths))
        return LocalSums(
            loss_sums_K=torch.stack([part.loss_sums_K for part in parts]).sum(0),
            balance_loss=torch.stack([part.balance_loss for part in parts]).sum(),
            loads={name: load_E for part in parts for name, load_E in part.loads.items()},
        )


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Add a note with the place to an exception that passes through."""
    try:
        yield
    except BaseException as error:
        error.add_note(place)
        raise
