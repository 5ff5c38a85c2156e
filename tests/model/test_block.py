"""One decoder layer: its phases, the attached balance loss, dropout."""

import pytest
import torch
from torch import Tensor

from model.block import Block, attach_loss
from model.config import ModelConfig
from model.moe import MoE
from model.rope import RotaryEmbedding
from model.transformer import Transformer
from tests.model.oracle import randomize
from tests.model.small import relative, small

B, S = 2, 10
Inputs = tuple[Tensor, Tensor, Tensor]


def make_block(config: ModelConfig, index: int) -> Block:
    model = Transformer(config)
    randomize(model, seed=0)
    block = model.layers[str(index)]
    assert isinstance(block, Block)
    return block


def inputs(config: ModelConfig) -> Inputs:
    x_BSD = torch.randn(B, S, config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions_BS = torch.arange(S).expand(B, -1)
    return x_BSD.requires_grad_(), RotaryEmbedding(config.attention, None)(positions_BS), positions_BS


def test_phases_called_one_by_one_equal_forward() -> None:
    config = small()
    block, (x_BSD, table, positions) = make_block(config, 1), inputs(config)
    whole = block(x_BSD, table, positions, balance_scale=0.5)
    whole.x_BSD.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()

    attended = block.attend(x_BSD, table, positions)
    routed = block.route(attended)
    dispatched = block.dispatch(routed)
    output = block.experts(routed, dispatched)
    combined = block.combine(attended, output, routed, dispatched, balance_scale=0.5)
    assert torch.equal(combined, whole.x_BSD)
    combined.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name


def test_layer_module_alone_equals_its_phases() -> None:
    config = small()
    block = make_block(config, 1)
    x_BSD = inputs(config)[0]
    y_BSD, routing = block.moe(x_BSD)
    assert y_BSD.shape == x_BSD.shape
    assert int(routing.load_E.sum()) == B * S * config.moe.top_k


def test_dense_layer_has_no_load_and_no_experts() -> None:
    config = small()
    block = make_block(config, 0)
    output = block(*inputs(config))
    assert output.load_E.shape == (0,)
    assert output.load_E.dtype == torch.int64
    assert output.balance_loss == 0
    with pytest.raises(TypeError, match="dense layer"):
        _ = block.moe


def test_attached_balance_loss_equals_adding_it_to_the_objective() -> None:
    config = small(balance_loss_weight=100.0)
    block, (x_BSD, table, positions) = make_block(config, 1), inputs(config)
    parameters = [x_BSD, *block.parameters()]
    attached = block(x_BSD, table, positions, balance_scale=0.25)
    ours = torch.autograd.grad(attached.x_BSD.square().sum(), parameters)
    assert not attached.balance_loss.requires_grad

    plain = block(x_BSD, table, positions)
    without = torch.autograd.grad(plain.x_BSD.square().sum(), parameters)
    routed = block.route(block.attend(x_BSD, table, positions))
    plain = block(x_BSD, table, positions)
    objective = plain.x_BSD.square().sum() + 0.25 * routed.routing.balance_loss
    expected = torch.autograd.grad(objective, parameters)
    assert all(relative(got, want) < 1e-5 for got, want in zip(ours, expected, strict=True))
    gate = [name for name, _ in block.named_parameters()].index("ffn.gate.weight") + 1
    assert (ours[gate] - without[gate]).norm() > 1e-3 * without[gate].norm()


def test_output_may_be_detached_in_place() -> None:
    """Split backward passes of pipeline schedules do so, which a view refuses."""
    config = small()
    for index in (0, 1):
        output = make_block(config, index)(*inputs(config), balance_scale=1.0).x_BSD
        assert not output._is_view()
        output.detach_()


def test_attaching_leaves_the_value() -> None:
    x, loss = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, loss, 0.125)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert x.grad is not None
    assert loss.grad is not None
    assert x.grad.tolist() == [3, 3, 3]
    assert loss.grad == 0.125


@pytest.mark.parametrize("index", [0, 1])
def test_dropout_acts_on_both_branches_and_only_in_training(index: int) -> None:
    config = small(dropout=0.5)
    block, (x_BSD, table, positions) = make_block(config, index), inputs(config)
    reference = make_block(small(), index)(x_BSD, table, positions).x_BSD
    block.eval()
    assert torch.equal(block(x_BSD, table, positions).x_BSD, reference)
    block.train()
    torch.manual_seed(0)
    added_BSD = block.attend(x_BSD, table, positions) - x_BSD
    assert added_BSD.eq(0).float().mean() == pytest.approx(0.5, abs=0.1)
    with torch.no_grad():
        block.attn.wo.weight.zero_()
    added_BSD = block(x_BSD, table, positions).x_BSD - x_BSD
    assert added_BSD.eq(0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_shared_experts_may_be_absent() -> None:
    config = small(num_shared_experts=0)
    block = make_block(config, 1)
    assert isinstance(block.ffn, MoE)
    assert block.ffn.shared_experts is None
    assert not [name for name, _ in block.named_parameters() if "shared" in name]
    assert block(*inputs(config)).x_BSD.isfinite().all()
