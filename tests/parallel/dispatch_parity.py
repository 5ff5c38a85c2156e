"""An MoE layer whose experts are spread over processes, against the same layer on one process.

Every process has tokens of its own, as many as it likes. What depends on them alone (output, gradients of
input, norm, gate, shared experts) is compared with the whole layer on these tokens; the gradients of the
experts held here with the whole layer on all processes' tokens.

Experts in FP8 have tiles along the rows of all tokens. They are compared with the whole layer on everybody's
tokens at once, in order of processes, where each expert has the same rows in the same order.

Legend: S tokens of a process (one sequence), T tokens, D hidden, A experts per token, R routed rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch._dynamo  # torch's checkpoint imports it at its first use, here once before processes fork
import torch.distributed as dist
from torch import Tensor, nn

from model.config import Gemm, PrecisionConfig, Recompute
from model.dispatch import Dispatched, TokenDispatcher
from model.fp8 import Fp8Policy
from model.kernels.fp8 import ROW_TILE, quantize
from model.moe import MoE
from model.norm import RMSNorm
from model.recompute import region, run_block, saving
from model.router import Routing
from parallel.exchange import Steps
from parallel.expert import AllToAllDispatcher
from parallel.groups import Trace
from parallel.two_hop import TwoHopDispatcher
from tests.model.live_bytes import LiveBytes
from tests.model.small import relative, small

T = TypeVar("T")

MakeDispatcher = Callable[[int, Recompute, Trace], TokenDispatcher]
"""Of the process's rank, for NUM_EXPERTS experts."""

CONFIG = small(num_experts=8, top_k=3, num_groups=4, top_k_groups=2)
NUM_EXPERTS, TOP_K, HIDDEN = CONFIG.moe.num_experts, CONFIG.moe.top_k, CONFIG.hidden_size


@dataclass(frozen=True)
class Case:
    """tokens: per process. favoured: the gate chooses among these experts only. fp8: the routed experts."""

    tokens: tuple[int, ...]
    recompute: Recompute = Recompute.none
    dtype: torch.dtype = torch.float32
    favoured: tuple[int, ...] = ()
    tolerance: float = 1e-6
    hidden: int = HIDDEN
    fp8: bool = False


def cases(*tokens: tuple[int, ...]) -> list[Case]:
    """Return every way to recompute, each numbers of tokens, processes without rows, and BF16."""
    return [
        *(Case(tokens[0], recompute=recompute) for recompute in Recompute),
        *(Case(some) for some in tokens[1:]),
        Case(tokens[0], favoured=(0, 1, 2, 3)),
        Case(tokens[0], dtype=torch.bfloat16, tolerance=2e-2),
        Case(tokens[0], dtype=torch.bfloat16, recompute=Recompute.deepseek, tolerance=2e-2),
    ]


class Layer(nn.Module):
    """The second half of a block: norm and MoE. The same weights in every process."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.recompute = case.recompute
        config = replace(CONFIG, hidden_size=case.hidden)
        self.norm = RMSNorm(case.hidden, eps=1e-6)
        self.moe = MoE(config, dtype=case.dtype, recompute=case.recompute)
        if case.fp8:
            policy = Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference))
            self.moe.experts.feed_forward = policy.experts
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if case.favoured:
            self.moe.gate.bias[list(case.favoured)] += 10.0
        self.dispatched: Dispatched | None = None  # of the last forward pass

    def forward(self, x_1SD: Tensor) -> Tensor:
        return run_block(self.recompute, self._phases, x_1SD)

    def route(self, x_1SD: Tensor) -> Routing:
        if x_1SD.shape[1]:
            return self.moe.gate(x_1SD)
        indices_TA = torch.empty(0, TOP_K, dtype=torch.int64)  # the gate itself wants tokens
        weights_TA = torch.empty(0, TOP_K, requires_grad=True)
        return Routing(indices_TA, weights_TA, torch.zeros(NUM_EXPERTS, dtype=torch.int64), torch.zeros(()))

    def _phases(self, x_1SD: Tensor) -> Tensor:
        with saving(self.recompute):
            normed_1SD = region(self.recompute, self.norm, x_1SD)
            self.dispatched = self.moe.dispatch(normed_1SD, self.route(normed_1SD))
            output = self.moe.run_experts(normed_1SD, self.dispatched)
            return self.moe.combine(output, self.dispatched)


def held(rank: int, world_size: int) -> slice:
    """Return the experts of a process."""
    return slice(rank * NUM_EXPERTS // world_size, (rank + 1) * NUM_EXPERTS // world_size)


def spread_layer(case: Case, rank: int, dispatcher: TokenDispatcher) -> Layer:
    """Return the layer with this process's experts only."""
    layer = Layer(case)
    experts = layer.moe.experts
    for name, whole in list(experts.named_parameters()):
        part = whole.detach()[held(rank, len(case.tokens))].clone()
        setattr(experts, name, nn.Parameter(part))
    layer.moe.dispatcher = dispatcher
    return layer


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Return a process's tokens [1, S, D] and the gradient of the output [S, D]."""
    generator = torch.Generator().manual_seed(100 + rank)
    x_1SD = torch.randn(1, case.tokens[rank], case.hidden, generator=generator).to(case.dtype)
    direction_SD = torch.randn(x_1SD.shape[1:], generator=generator)
    if case.fp8:  # magnitudes that differ: with equal scales, tiles in either direction round alike
        sizes_SD = torch.randint(-8, 9, direction_SD.shape, generator=generator)
        direction_SD = direction_SD * torch.exp2(sizes_SD.float())
    return x_1SD.requires_grad_(), direction_SD.to(case.dtype)


def choices(case: Case) -> list[list[set[int]]]:
    """Return the experts of each token of each process."""
    layer = Layer(case)
    routings = [layer.route(layer.norm(inputs(case, rank)[0])) for rank in range(len(case.tokens))]
    return [[set(chosen) for chosen in routing.indices_TA.tolist()] for routing in routings]


Results = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Output, gradient of the input, and the parameters' gradients."""


def forward_backward(layer: Layer, case: Case, *ranks: int) -> Results:
    """Return what the layer gives for the tokens of some processes, one after the other."""
    parts = [inputs(case, rank) for rank in ranks]
    x_1SD = torch.cat([x_1SD.detach() for x_1SD, _ in parts], 1).requires_grad_()
    direction_SD = torch.cat([direction_SD for _, direction_SD in parts])
    y_SD = layer(x_1SD)
    (y_SD * direction_SD).sum().backward()
    assert x_1SD.grad is not None
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in layer.named_parameters()
    }
    layer.zero_grad()
    return y_SD.detach(), x_1SD.grad, grads


def check_parity(case: Case, rank: int, make: MakeDispatcher) -> None:
    """Assert that spreading the experts changes no output and no gradient, and that no row is lost."""
    world_size = len(case.tokens)
    layer = spread_layer(case, rank, make(rank, case.recompute, Trace()))
    y_SD, dx_1SD, grads = forward_backward(layer, case, rank)
    whole = Layer(Case(case.tokens, dtype=case.dtype, favoured=case.favoured))
    results = [forward_backward(whole, case, other) for other in range(world_size)]
    pairs = {"output": (y_SD, results[rank][0]), "input": (dx_1SD, results[rank][1])}
    for name, grad in grads.items():
        if ".experts." in name:
            total = torch.stack([theirs[name].float() for _, _, theirs in results]).sum(0)
            pairs[name] = (grad, total[held(rank, world_size)])
        else:
            pairs[name] = (grad, results[rank][2][name])
    errors = {name: relative(ours.float(), theirs.float()) for name, (ours, theirs) in pairs.items()}
    assert len(errors) == 10, sorted(errors)
    assert max(errors.values()) < case.tolerance, f"{case}: {errors}"
    assert case.tokens[rank] == 0 or y_SD.abs().max() > 0
    check_counts(case, rank, layer.dispatched)


def check_fp8_parity(case: Case, rank: int, make: MakeDispatcher) -> None:
    """Assert that FP8 experts give the same wherever they are, output and every gradient."""
    layer = spread_layer(case, rank, make(rank, case.recompute, Trace()))
    y_SD, dx_1SD, grads = forward_backward(layer, case, rank)
    everyone = range(len(case.tokens))
    y_TD, dx_1TD, expected = forward_backward(Layer(replace(case, recompute=Recompute.none)), case, *everyone)
    pairs = {
        "output": (y_SD, y_TD.split(case.tokens)[rank]),
        "input": (dx_1SD, dx_1TD.split(case.tokens, 1)[rank]),
    }
    for name, grad in grads.items():
        if ".experts." in name:
            pairs[name] = (grad, expected[name][held(rank, len(case.tokens))])
        else:
            total = grad.float()
            dist.all_reduce(total)
            pairs[name] = (total, expected[name])
    errors = {name: relative(ours.float(), theirs.float()) for name, (ours, theirs) in pairs.items()}
    assert len(errors) == 10, sorted(errors)
    if case.dtype is torch.bfloat16:  # each process rounds its part of a sum over tokens
        assert all(errors.pop(f"moe.shared_experts.{name}.weight") < 2e-2 for name in ("w1", "w2", "w3"))
    assert max(errors.values()) < case.tolerance, f"{case}: {errors}"


def check_coding_changes_no_bit(
    case: Case, rank: int, numbers: MakeDispatcher, codes: MakeDispatcher
) -> None:
    """Assert that FP8 experts do not notice how their rows travelled: output, gradients, and the rows."""
    results, rows = [], []
    for make in (numbers, codes):
        layer = spread_layer(case, rank, make(rank, case.recompute, Trace()))
        results.append(forward_backward(layer, case, rank))
        assert layer.dispatched is not None
        rows.append(layer.dispatched.rows_RD.detach())
    (y_SD, dx_1SD, grads), (coded_y_SD, coded_dx_1SD, coded_grads) = results
    assert torch.equal(y_SD, coded_y_SD)
    assert torch.equal(dx_1SD, coded_dx_1SD)
    assert all(torch.equal(grad, coded_grads[name]) for name, grad in grads.items())
    by_row = quantize(rows[0], ROW_TILE, power_of_two=True)
    assert torch.equal(rows[1], by_row.dequantize(case.dtype))
    assert rows[0].numel() == 0 or not torch.equal(rows[1], rows[0])


def fp8_cases(*tokens: tuple[int, ...]) -> list[Case]:
    """Return FP8 experts with every way to recompute, each numbers of tokens, and both compute types.

    Rows are a tile and a part of one, or a part of one.
    """
    usual = Case(tokens[0], hidden=160, fp8=True, tolerance=1e-5)
    return [
        *(replace(usual, recompute=recompute) for recompute in Recompute),
        *(replace(usual, tokens=some, hidden=HIDDEN) for some in tokens[1:]),
        replace(usual, favoured=(0, 1, 2, 3)),
        replace(usual, dtype=torch.bfloat16),
        replace(usual, dtype=torch.bfloat16, recompute=Recompute.deepseek),
    ]


def check_counts(case: Case, rank: int, dispatched: Dispatched | None) -> None:
    """Assert that each expert held here has a row for every token that chose it."""
    assert dispatched is not None
    everyone = [chosen for tokens in choices(case) for chosen in tokens]
    mine = range(NUM_EXPERTS)[held(rank, len(case.tokens))]
    assert dispatched.counts == [sum(expert in chosen for chosen in everyone) for expert in mine]
    assert sum(dispatched.counts) == len(dispatched.rows_RD) == len(dispatched.row_weights_R)
    assert dispatched.rows_RD.dtype == case.dtype
    assert dispatched.row_weights_R.dtype == torch.float32


def traffic(case: Case, rank: int, make: MakeDispatcher) -> list[tuple[str, int]]:
    """Return group and bytes of every all-to-all of one forward and backward pass, in order."""
    sent: list[tuple[str, int]] = []
    trace = Trace()
    trace.listeners.append(lambda call: sent.append((call.group, call.num_bytes)))
    forward_backward(spread_layer(case, rank, make(rank, case.recompute, trace)), case, rank)
    assert trace.under_way == []
    return sent


def random_tokens() -> tuple[Tensor, Routing]:
    """Return 16 tokens and where they go, both with gradient."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(16, 256, generator=generator, requires_grad=True)
    indices_TA = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in x_TD])
    weights_TA = torch.rand(indices_TA.shape, generator=generator, requires_grad=True)
    load_E = torch.bincount(indices_TA.flatten(), minlength=NUM_EXPERTS)
    return x_TD, Routing(indices_TA, weights_TA, load_E, torch.zeros(()))


def check_cut_at_exchanges(
    dispatcher: AllToAllDispatcher | TwoHopDispatcher, *, exchanges: int, fp8: bool = False
) -> None:
    """Assert that the pieces between exchanges, differentiated one by one, give the whole gradient.

    What leads back around an exchange would bring a gradient to the tokens before the first piece's turn.
    fp8: the dispatcher's rows are codes, and the gradient is the one at the tokens that these stand for.
    """
    cuts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def run_in_pieces(steps: Steps[T]) -> T:
        try:
            sent = next(steps).tensors
            while True:
                arrived = tuple(x.detach().requires_grad_(x.requires_grad) for x in sent)
                cuts.append((sent, arrived))
                sent = steps.send(arrived).tensors
        except StopIteration as end:
            return end.value

    x_TD, routing = random_tokens()
    dispatched = run_in_pieces(dispatcher.dispatch_steps(x_TD, routing))
    rows_RD = dispatched.rows_RD * dispatched.row_weights_R[:, None]
    run_in_pieces(dispatcher.combine_steps(rows_RD, dispatched)).square().sum().backward()
    assert len(cuts) == exchanges
    for sent, arrived in reversed(cuts):
        assert x_TD.grad is None
        assert routing.weights_TA.grad is None
        wanted = [(x, y.grad) for x, y in zip(sent, arrived, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])

    x_again_TD, plain = random_tokens()
    if fp8:
        coded_TD = quantize(x_again_TD.detach(), ROW_TILE, power_of_two=True)
        x_again_TD = coded_TD.dequantize().requires_grad_()
    ((x_again_TD * plain.weights_TA.sum(1, keepdim=True)).square()).sum().backward()
    for ours, expected in ((x_TD, x_again_TD), (routing.weights_TA, plain.weights_TA)):
        assert ours.grad is not None
        assert expected.grad is not None
        assert relative(ours.grad, expected.grad) < 1e-6


def held_after_dispatch(dispatcher: TokenDispatcher, recompute: Recompute) -> tuple[int, int]:
    """Return the bytes held for a matrix product with the dispatched rows, and the bytes of these rows."""
    x_TD, routing = random_tokens()
    weight_D1 = torch.ones(256, 1, requires_grad=True)
    with LiveBytes() as live, saving(recompute):
        dispatched = dispatcher.dispatch(x_TD, routing)
        total = (dispatched.rows_RD @ weight_D1).sum()
    num_bytes = dispatched.rows_RD.nbytes
    live.forget(x_TD, weight_D1, total, routing.weights_TA)
    del dispatched
    held = live.num_bytes
    total.backward()
    assert weight_D1.grad is not None
    torch.testing.assert_close(weight_D1.grad[:, 0], TOP_K * x_TD.detach().sum(0))
    return held, num_bytes
