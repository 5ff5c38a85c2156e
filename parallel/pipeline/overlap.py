"""A chunk that gives up its turn at every exchange of tokens (arXiv 2412.19437, section 3.2.1).

While the tokens of one microbatch travel to their experts or back, another microbatch computes: a schedule
takes one pass forwards and one backwards and gives them turns. Only blocks that exchange tokens are cut into
phases; all others run as they are.

Legend: B sequences, S length (s of it on this device), T = B * s, D hidden, A experts per token, R routed
rows, K = 1 + MTP depths, F rotary frequencies.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

from model.block import Block, BlockOutput, Routed
from model.config import Recompute
from model.dispatch import Dispatched
from model.moe import MoE
from model.mtp import MtpLayer
from model.recompute import saving
from model.router import Routing
from model.transformer import ModelOutput, Transformer
from parallel.exchange import Steps
from parallel.pipeline.tape import Tape
from parallel.pipeline.turns import Turns
from parallel.schedule import Batch

T = TypeVar("T")


@runtime_checkable
class SteppedDispatcher(Protocol):
    """A dispatcher whose exchanges can be driven from outside; see parallel/exchange.py."""

    def dispatch_steps(self, x_TD: Tensor, routing: Routing) -> Steps[Dispatched]:
        """`dispatch`, in steps."""
        ...

    def combine_steps(self, rows_RD: Tensor, dispatched: Dispatched) -> Steps[Tensor]:
        """`combine`, in steps."""
        ...


@dataclass(frozen=True)
class _Surroundings:
    """What all blocks of a pass are given beside their input."""

    table_BS2F: Tensor
    positions_BS: Tensor
    balance_scale: float


def in_phases(
    chunk: Transformer, tape: Tape, microbatch: Batch, hidden_BsD: Tensor | None, balance_scale: float
) -> Turns[ModelOutput]:
    """Run the chunk, giving up the turn whenever an exchange has started; what `chunk(...)` computes."""
    positions_BS = microbatch.positions_BS
    around = _Surroundings(chunk.rope(positions_BS), positions_BS, balance_scale)
    embeddings_KBSD = list(tape.cut(*chunk.embeddings(microbatch.tokens_BKS)))
    outputs: list[BlockOutput] = []
    x_BSD = embeddings_KBSD.pop(0) if hidden_BsD is None else hidden_BsD
    for layer in chunk.layers.values():
        outputs.append((yield from _block(cast(Block, layer), tape, x_BSD, around)))
        x_BSD = outputs[-1].x_BSD
    hidden_KBSD = [chunk.norm(x_BSD) if chunk.part.last else x_BSD]
    for embedding_BSD, layer in zip(embeddings_KBSD, chunk.mtp.values(), strict=False):
        hidden_KBSD[-1:] = tape.cut(hidden_KBSD[-1])  # for this depth and for the head
        depth = _mtp_layer(cast(MtpLayer, layer), tape, embedding_BSD, hidden_KBSD[-1], around)
        outputs.append((yield from depth))
        hidden_KBSD.append(outputs[-1].x_BSD)
    return chunk.collect(hidden_KBSD, outputs)


def _mtp_layer(
    layer: MtpLayer, tape: Tape, embedding_BSD: Tensor, hidden_BSD: Tensor, around: _Surroundings
) -> Turns[BlockOutput]:
    output = yield from _block(layer.block, tape, layer.join(embedding_BSD, hidden_BSD), around)
    return output._replace(x_BSD=layer.norm(output.x_BSD))


def _block(block: Block, tape: Tape, x_BSD: Tensor, around: _Surroundings) -> Turns[BlockOutput]:
    dispatcher = block.ffn.dispatcher if isinstance(block.ffn, MoE) else None
    if not isinstance(dispatcher, SteppedDispatcher):
        return block(x_BSD, around.table_BS2F, around.positions_BS, balance_scale=around.balance_scale)
    if block.recompute is Recompute.full and block.dropout:
        raise ValueError(
            "recompute=full with dropout cannot be overlapped: the second run would drop other values; "
            "use recompute=core, or dropout=0"
        )
    phases = partial(_phases, block, dispatcher, around)
    if block.recompute is Recompute.full:
        return (yield from tape.replay(phases, x_BSD))
    return (yield from phases(tape, x_BSD))


def _phases(
    block: Block, dispatcher: SteppedDispatcher, around: _Surroundings, tape: Tape, x_BSD: Tensor
) -> Turns[BlockOutput]:
    """Run a block, cut wherever a tensor is used beyond one of its two exchanges."""
    (x_BSD,) = tape.cut(block.attend(x_BSD, around.table_BS2F, around.positions_BS))
    routed = block.route(x_BSD)
    routing = routed.routing
    normed_BSD, weights_TA, balance_loss = tape.cut(
        routed.normed_BSD, routing.weights_TA, routing.balance_loss
    )
    routed = Routed(normed_BSD, replace(routing, weights_TA=weights_TA, balance_loss=balance_loss))
    dispatched = yield from _drive(
        dispatcher.dispatch_steps(normed_BSD.flatten(0, 1), routed.routing), tape, block.recompute
    )
    output = block.experts(routed, dispatched)
    # cut as well: going back, the exchange then starts before the shared experts are differentiated
    shared_TD = None if output.shared_TD is None else tape.cut(output.shared_TD)[0]
    y_TD = yield from _drive(dispatcher.combine_steps(output.rows_RD, dispatched), tape, block.recompute)
    y_TD = y_TD if shared_TD is None else y_TD + shared_TD
    x_BSD = block.add(x_BSD, y_TD, balance_loss, balance_scale=around.balance_scale)
    return BlockOutput(x_BSD, routing.load_E, balance_loss.detach())


def _drive(steps: Steps[T], tape: Tape, recompute: Recompute) -> Turns[T]:
    """Run a dispatcher's steps; what they compute between exchanges saves recipes like any phase."""
    arrived: tuple[Tensor, ...] | None = None
    while True:
        with saving(recompute):  # left before the turn is given up: the other pass has a context of its own
            try:
                exchange = next(steps) if arrived is None else steps.send(arrived)
            except StopIteration as end:
                return end.value
        arrived = yield from tape.exchange(exchange)
