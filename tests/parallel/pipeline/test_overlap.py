"""A model cut into stages and run in turns gives the gradients of plain autograd, in every recompute mode."""

import gc

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, Recompute
from model.transformer import Transformer
from model.weight_gradients import WeightGradients, install
from parallel.groups import Group
from parallel.pipeline.chunk import ForwardTurns, Pass, in_one_go
from parallel.pipeline.overlap import in_phases
from parallel.pipeline.turns import Turns, alternate, finish
from parallel.schedule import Batch, LossFunction, MicrobatchLoss
from tests.model.live_bytes import LiveBytes
from tests.parallel.pipeline.models import (
    MTP_WEIGHT,
    batch_of,
    chunk_of,
    config_of,
    gradients,
    one_process,
    parts_of,
    use_exchanges,
)
from train.loss import Objective

CONFIG = config_of(3)


class Line:
    """Two stages on one process, whose experts are reached through exchanges of a process with itself."""

    def __init__(
        self, recompute: Recompute, run: ForwardTurns, config: ModelConfig = CONFIG, *, exchanges: bool = True
    ) -> None:
        self.run = run
        self.chunks = [chunk_of(config, part, recompute) for part in parts_of(config, 2)]
        self.chunks[1].embed = self.chunks[0].embed
        for chunk in self.chunks:
            if exchanges:
                use_exchanges(chunk, Group("ep"), config, recompute)
        self.loss_function: LossFunction = Objective(self.chunks[1].head.weight)

    def passes(self, microbatch: Batch) -> list[Pass]:
        def objective(output: object, microbatch: Batch) -> MicrobatchLoss:
            return self.loss_function(
                output,  # type: ignore[arg-type]
                microbatch.labels_BKS,
                valid_K=microbatch.valid_K,
                mtp_weight=MTP_WEIGHT,
                loss_scale=1.0,
            )

        scale = 1.0 / microbatch.global_sequences
        return [
            Pass(chunk, microbatch, objective=objective, balance_scale=scale, run=self.run)
            for chunk in self.chunks
        ]


def forward(passes: list[Pass]) -> Turns[None]:
    hidden = yield from passes[0].forward(None)
    assert (yield from passes[1].forward(hidden)) is None


def backward(passes: list[Pass]) -> Turns[None]:
    gradient = yield from passes[1].backward(None)
    assert (yield from passes[0].backward(gradient)) is None


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model, _ = one_process(CONFIG, batch_of(4), 2)
    return gradients([model])


def assert_bit_identical(line: Line, expected: dict[str, Tensor]) -> None:
    """All gradients but the embedding's, whose rows two stages look up at different times."""
    ours = gradients(line.chunks)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        if name == "embed.weight":
            torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("run", [in_one_go, in_phases])
@pytest.mark.parametrize("recompute", Recompute)
def test_two_stages_equal_one_model(
    recompute: Recompute, run: ForwardTurns, expected: dict[str, Tensor]
) -> None:
    line = Line(recompute, run)
    for microbatch in batch_of(4).microbatches(2):
        passes = line.passes(microbatch)
        finish(forward(passes))
        finish(backward(passes))
    assert_bit_identical(line, expected)


@pytest.mark.parametrize("recompute", Recompute)
def test_passes_that_alternate_equal_passes_in_a_row(
    recompute: Recompute, expected: dict[str, Tensor]
) -> None:
    line = Line(recompute, in_phases)
    first, second = map(line.passes, batch_of(4).microbatches(2))
    finish(forward(first))
    alternate(forward(second), backward(first))
    finish(backward(second))
    assert_bit_identical(line, expected)


@pytest.mark.parametrize("run", [in_one_go, in_phases])
@pytest.mark.parametrize("recompute", Recompute)
def test_weight_gradients_may_come_later(
    recompute: Recompute, run: ForwardTurns, expected: dict[str, Tensor]
) -> None:
    line, weights = Line(recompute, run), WeightGradients()
    for chunk in line.chunks:
        install(chunk, weights)
    waiting = []
    for microbatch in batch_of(4).microbatches(2):
        passes = line.passes(microbatch)
        finish(forward(passes))
        with weights.put_off() as work:
            finish(backward(passes))
        waiting += work
    assert line.chunks[0].layers["0"].attn.wo.weight.grad is None
    for product in waiting:
        product()
    ours = gradients(line.chunks)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def turns_of(turns: Turns[None]) -> int:
    count = 0
    for _ in turns:
        count += 1
    return count


@pytest.mark.parametrize(
    ("recompute", "backward_turns"), [(Recompute.none, 6), (Recompute.core, 6), (Recompute.full, 12)]
)
def test_a_turn_ends_at_every_exchange(recompute: Recompute, backward_turns: int) -> None:
    """Three blocks have experts, each with two exchanges; `full` repeats those of the forward pass."""
    line = Line(recompute, in_phases)
    passes = line.passes(batch_of(2))
    assert turns_of(forward(passes)) == 6
    assert turns_of(backward(passes)) == backward_turns


def test_blocks_without_exchanges_run_as_they_are(expected: dict[str, Tensor]) -> None:
    line = Line(Recompute.none, in_phases, exchanges=False)
    for microbatch in batch_of(4).microbatches(2):
        passes = line.passes(microbatch)
        assert turns_of(forward(passes)) == turns_of(backward(passes)) == 0
    assert_bit_identical(line, expected)


def held_by(recompute: Recompute, run: ForwardTurns) -> int:
    """Return the bytes that live between a forward and a backward pass."""
    line, microbatch = Line(recompute, run), batch_of(4)
    lasting = [t for chunk in line.chunks for t in (*chunk.parameters(), *chunk.buffers())]
    gc.collect()
    with LiveBytes() as live:
        passes = line.passes(microbatch)
        finish(forward(passes))
    live.forget(*lasting, microbatch.tokens_BKS, microbatch.labels_BKS, microbatch.positions_BS)
    held = live.num_bytes
    finish(backward(passes))
    return held


@pytest.mark.parametrize("recompute", Recompute)
def test_cutting_costs_no_memory(recompute: Recompute) -> None:
    plain, cut = held_by(recompute, in_one_go), held_by(recompute, in_phases)
    assert cut <= 1.01 * plain, (cut, plain)


def test_dropout_cannot_be_replayed() -> None:
    line = Line(Recompute.full, in_phases, config_of(3, dropout=0.1))
    with pytest.raises(ValueError, match="recompute=full with dropout"):
        finish(forward(line.passes(batch_of(2))))


def test_a_pass_runs_backwards_once() -> None:
    line = Line(Recompute.none, in_one_go)
    passes = line.passes(batch_of(2))
    with pytest.raises(RuntimeError, match="no loss was computed"):
        finish(passes[0].backward(None))
    finish(forward(passes))
    finish(backward(passes))
    with pytest.raises(RuntimeError, match="backwards already"):
        finish(passes[1].backward(None))


def test_parts_are_of_one_model() -> None:
    names = [name for chunk in Line(Recompute.none, in_phases).chunks for name, _ in chunk.named_parameters()]
    whole = [name for name, _ in Transformer(CONFIG).named_parameters()]
    assert sorted(set(names)) == sorted(whole)
