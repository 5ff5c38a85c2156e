"""Recomputation: the same gradients to the last bit, from less memory, freed when it should be."""

import gc
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from model.attention import LocalAttention, Memory
from model.config import Compute, Recompute
from model.dispatch import Dispatched, LocalDispatcher
from model.mla import MultiHeadLatentAttention
from model.moe import MoE
from model.recompute import core_region, derived, region, saving
from model.router import Routing
from model.transformer import ModelOutput, Transformer
from tests.model.live_bytes import LiveBytes, held_bytes
from tests.model.oracle import randomize
from tests.model.small import small

DISCARDING = (Recompute.deepseek, Recompute.core)
S = 16


def make(recompute: Recompute, compute: Compute = Compute.fp32, **changes: object) -> Transformer:
    model = Transformer(small(num_mtp_layers=2, **changes), recompute=recompute, compute=compute)
    randomize(model, seed=0)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens_BKS = torch.randint(64, (2, 3, S), generator=torch.Generator().manual_seed(1))
    return tokens_BKS, torch.arange(S).expand(2, -1)


def objective(output: ModelOutput) -> Tensor:
    return torch.stack([hidden_BSD.float().square().sum() for hidden_BSD in output.hidden_KBSD]).sum()


@pytest.mark.parametrize("compute", Compute)
@pytest.mark.parametrize("q_lora_rank", [12, None])
def test_gradients_and_loads_are_bit_identical(compute: Compute, q_lora_rank: int | None) -> None:
    expected: dict[str, Tensor] = {}
    load_LE = torch.empty(0)
    for recompute in Recompute:
        model = make(recompute, compute, q_lora_rank=q_lora_rank, dropout=0.1)
        torch.manual_seed(5)
        output = model(*batch(), balance_scale=0.5)
        objective(output).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(model.parameters())) - 1  # all but the head's
        if recompute is Recompute.none:
            expected, load_LE = gradients, output.load_LE
        assert torch.equal(output.load_LE, load_LE)
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), f"{recompute} {name}"


@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_each_mode_holds_less_than_the_one_before(compute: Compute) -> None:
    held = [held_bytes(make(recompute, compute), *batch()) for recompute in Recompute]
    assert all(more > less for more, less in itertools.pairwise(held)), held


@pytest.mark.parametrize("recompute", Recompute)
def test_nothing_outlives_the_graph(recompute: Recompute) -> None:
    """Also without the garbage collector: memory that waits for it is memory held."""
    model, inputs = make(recompute), batch()
    lasting = [*inputs, *model.parameters(), *model.buffers()]
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            loss = objective(model(*inputs))
            loss.backward()
        live.forget(*lasting, loss, *[p.grad for p in model.parameters() if p.grad is not None])
        del loss
        assert live.num_bytes == 0
        with LiveBytes() as live:
            loss = objective(model(*inputs))  # a graph that is never run backward
            del loss
        live.forget(*lasting)
        assert live.num_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("recompute", DISCARDING)
def test_backward_may_run_twice(recompute: Recompute) -> None:
    model = make(recompute)
    loss = objective(model(*batch()))
    leaves = [p for name, p in model.named_parameters() if name != "head.weight"]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class CountingCore(LocalAttention):
    """Counts what would be communication, and the attention itself."""

    def __init__(self) -> None:
        self.gathers = self.attends = 0

    def gather(self, memory: Memory) -> Memory:
        self.gathers += 1
        return Memory(memory.latent_BMC.clone(), memory.k_rope_BMP.clone(), memory.positions_BM)

    def attend(self, *args: Tensor, **kwargs: Tensor | float) -> Tensor:
        self.attends += 1
        return super().attend(*args, **kwargs)  # type: ignore[arg-type]


class CountingDispatcher(LocalDispatcher):
    """Counts what would be communication."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        self.calls += 1
        return super().dispatch(x_TD, routing)

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        self.calls += 1
        return super().combine(rows_RD, dispatched)


@pytest.mark.parametrize(
    ("recompute", "times"), [(Recompute.none, 1), (Recompute.deepseek, 1), (Recompute.core, 2)]
)
def test_communication_is_never_repeated(recompute: Recompute, times: int) -> None:
    model = make(recompute)
    cores, dispatchers = [CountingCore() for _ in range(5)], [CountingDispatcher() for _ in range(4)]
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    for attention, core in zip(attentions, cores, strict=True):
        attention.core = core
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    for layer, dispatcher in zip(layers, dispatchers, strict=True):
        layer.dispatcher = dispatcher
    objective(model(*batch())).backward()
    assert [core.gathers for core in cores] == [1] * 5
    assert [core.attends for core in cores] == [times] * 5
    assert [dispatcher.calls for dispatcher in dispatchers] == [2] * 4


def test_a_region_runs_again_once_for_all_its_consumers() -> None:
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x

    x, weight = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    with saving(Recompute.deepseek):
        y = region(Recompute.deepseek, double, x)
        z = region(Recompute.deepseek, double, y)  # its own input is a region's output
        loss = (y @ weight).sum() + (y[1:].T @ weight[1:]).sum() + (z.view(9) * weight.view(9)).sum()
    del y, z
    assert calls == 2
    loss.backward()
    assert calls == 4
    assert weight.grad is not None
    assert torch.equal(weight.grad[0], torch.full((3,), 10.0))
    assert torch.equal(weight.grad[1:], torch.full((2, 3), 16.0))


def test_what_is_derived_follows_its_tensor() -> None:
    """Recomputed with the output of a region that it was derived from; kept if derived from anything else."""
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x

    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    for wrap, held, runs in (
        (partial(region, Recompute.deepseek, torch.sin), 0, 1),
        (torch.sin, 2 * 4 * x.itemsize, 0),
    ):
        with LiveBytes() as live, saving(Recompute.deepseek):
            y = wrap(x)
            z = derived(double, y.detach()[1:])  # a view of the output is enough
            loss = (z * weight).sum()
        del y, z
        live.forget(x, weight, loss)
        assert live.num_bytes == held
        calls = 0
        (gradient,) = torch.autograd.grad(loss, weight)
        assert calls == runs
        torch.testing.assert_close(gradient, 2 * x.detach()[1:].sin().sum(0))


def test_a_core_region_that_changes_its_work_is_refused() -> None:
    calls = 0

    def fickle(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.sin() if calls == 1 else x.sin().cos()

    x = torch.ones(3, requires_grad=True)
    with saving(Recompute.core):
        loss = core_region(Recompute.core, fickle, x).exp().sum()
    with pytest.raises(RuntimeError, match="same work"):
        loss.backward()


@pytest.mark.parametrize("recompute", Recompute)
def test_nothing_is_kept_without_gradients(recompute: Recompute) -> None:
    model = make(recompute)
    with torch.no_grad():
        assert held_bytes(model, *batch()) == 0
