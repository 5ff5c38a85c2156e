"""One microbatch on its way through one stage, forwards and later backwards.

Legend: B sequences, s tokens of a sequence on this rank, D hidden, K = 1 + MTP depths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.transformer import ModelOutput, Transformer
from parallel.pipeline.tape import Tape
from parallel.pipeline.turns import Turns
from parallel.schedule import Batch, MicrobatchLoss

ForwardTurns = Callable[[Transformer, Tape, Batch, Tensor | None, float], Turns[ModelOutput]]
"""How a chunk of the model is run: chunk, tape, microbatch, hidden states, gradient of the balance losses."""


def in_one_go(
    chunk: Transformer, tape: Tape, microbatch: Batch, hidden_BsD: Tensor | None, balance_scale: float
) -> Turns[ModelOutput]:
    """Run the chunk in a single turn; exchanges are waited for where they are."""
    yield from ()
    return chunk(microbatch.tokens_BKS, microbatch.positions_BS, hidden_BsD, balance_scale=balance_scale)


MicrobatchObjective = Callable[[ModelOutput, Batch], MicrobatchLoss]
"""A microbatch's share of the objective, from what the last stage computed for it."""


class Pass:
    """`forward`, and once its gradient is there `backward`; in between the activations are kept.

    Args:
        chunk: the part of the model that the stage holds.
        microbatch: its sequences.
        objective: what the last stage computes from its output.
        balance_scale: the gradient of the balance losses.
        run: how the chunk is run.
    """

    def __init__(
        self,
        chunk: Transformer,
        microbatch: Batch,
        *,
        objective: MicrobatchObjective,
        balance_scale: float,
        run: ForwardTurns = in_one_go,
    ) -> None:
        self._chunk, self._microbatch = chunk, microbatch
        self._objective, self._balance_scale, self._run = objective, balance_scale, run
        self._tape = Tape()
        self.output: ModelOutput | None = None
        """Of the forward pass, loads and balance loss only."""
        self.loss: MicrobatchLoss | None = None
        """Of the last stage, detached."""

    def forward(self, hidden_BsD: Tensor | None) -> Turns[Tensor | None]:
        """Return the hidden states for the next stage, detached; None from the last stage.

        hidden_BsD: what the stage before returned; None in the first stage.
        """
        if hidden_BsD is not None:
            hidden_BsD = self._tape.enter(hidden_BsD)
        output = yield from self._run(
            self._chunk, self._tape, self._microbatch, hidden_BsD, self._balance_scale
        )
        self.output = ModelOutput([], output.load_LE, output.balance_loss)
        if not self._chunk.part.last:
            self._tape.close(output.hidden_KBSD[0])
            return output.hidden_KBSD[0].detach()
        loss = self._objective(output, self._microbatch)
        self._tape.close(loss.total)
        self.loss = MicrobatchLoss(total=loss.total.detach(), loss_sums_K=loss.loss_sums_K)
        return None

    def backward(self, gradient_BsD: Tensor | None) -> Turns[Tensor | None]:
        """Add to the parameters' gradients; return the gradient of `hidden_BsD`, None in the first stage.

        gradient_BsD: of what `forward` returned; None in the last stage, whose result is the loss.
        """
        if gradient_BsD is not None:
            return (yield from self._tape.backward(gradient_BsD))
        if self.loss is None:
            raise RuntimeError("backward without a gradient, but no loss was computed here")
        return (yield from self._tape.backward(torch.ones_like(self.loss.total)))
