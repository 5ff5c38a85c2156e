"""The assembled model: names, types, causality, precision, stages."""

import pytest
import torch
from torch import Tensor

from model.config import Compute, ModelConfig, Recompute, YarnConfig
from model.init import initialize
from model.precision import torch_dtype
from model.transformer import ModelOutput, Transformer
from tests.model.oracle import randomize
from tests.model.small import relative, small

S = 12


def make(config: ModelConfig, **options: object) -> Transformer:
    model = Transformer(config, **options)  # type: ignore[arg-type]
    randomize(model, seed=0)
    return model


def run(model: Transformer, num_sequences: int = 2, **options: float) -> ModelOutput:
    depths = 1 + model.config.num_mtp_layers
    generator = torch.Generator().manual_seed(1)
    tokens_BKS = torch.randint(model.config.vocab_size, (num_sequences, depths, S), generator=generator)
    return model(tokens_BKS, torch.arange(S).expand(num_sequences, -1), **options)


def block_shapes(place: str, *, dense: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (32,),
        "attn.wq_a.weight": (12, 32),
        "attn.q_norm.weight": (12,),
        "attn.wq_b.weight": (24, 12),
        "attn.wkv_a.weight": (20, 32),
        "attn.kv_norm.weight": (16,),
        "attn.wkv_b.weight": (32, 16),
        "attn.wo.weight": (32, 16),
        "ffn_norm.weight": (32,),
    }
    if dense:
        shapes |= {"ffn.w1.weight": (48, 32), "ffn.w2.weight": (32, 48), "ffn.w3.weight": (48, 32)}
    else:
        shapes |= {
            "ffn.gate.weight": (8, 32),
            "ffn.gate.bias": (8,),
            "ffn.experts.w1": (8, 12, 32),
            "ffn.experts.w2": (8, 32, 12),
            "ffn.experts.w3": (8, 12, 32),
            "ffn.shared_experts.w1.weight": (24, 32),
            "ffn.shared_experts.w2.weight": (32, 24),
            "ffn.shared_experts.w3.weight": (24, 32),
        }
    return {f"{place}.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("compute", Compute)
def test_checkpoint_names_shapes_and_types(compute: Compute) -> None:
    config = small(num_shared_experts=2, num_layers=2, num_mtp_layers=1)
    tensors = Transformer(config, compute=compute).state_dict()
    expected = {"embed.weight": (64, 32), "norm.weight": (32,), "head.weight": (64, 32)}
    expected |= block_shapes("layers.0", dense=True) | block_shapes("layers.1", dense=False)
    expected |= block_shapes("mtp.0.block", dense=False)
    expected |= {f"mtp.0.{part}.weight": (32,) for part in ("enorm", "hnorm", "norm")}
    expected["mtp.0.eh_proj.weight"] = (32, 64)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    for name, tensor in tensors.items():
        fp32 = "norm." in name or ".gate." in name
        assert tensor.dtype == (torch.float32 if fp32 else torch_dtype(compute)), name


def test_routers_and_loads_share_one_order() -> None:
    model = make(small(num_mtp_layers=2, num_layers=4))
    names = ["layers.1", "layers.2", "layers.3", "mtp.0.block", "mtp.1.block"]
    assert model.moe_layer_names() == names
    assert list(model.routers()) == names
    with torch.no_grad():
        for router in model.routers().values():
            router.bias.zero_()
        model.routers()["mtp.0.block"].bias[3] = 10
    load_LE = run(model).load_LE
    assert load_LE.dtype == torch.int64
    assert load_LE.sum(1).tolist() == [2 * S * 2] * 5
    assert [layer for layer in range(5) if load_LE[layer, 3] == 2 * S] == [3]


def test_balance_loss_is_the_sum_of_the_layers() -> None:
    model = make(small(num_mtp_layers=1, balance_loss_weight=0.01))
    output = run(model)
    # every f_i averages 1 and the P_i of a sequence sum to 1: near 0.01 per sequence and layer
    assert output.balance_loss.item() == pytest.approx(0.01 * 2 * 3, rel=0.3)
    assert not output.balance_loss.requires_grad
    assert run(make(small(num_dense_layers=3))).balance_loss == 0


def test_no_position_sees_a_later_token() -> None:
    model = make(small())
    tokens_BKS = torch.randint(64, (1, 1, S), generator=torch.Generator().manual_seed(2))
    changed = tokens_BKS.clone()
    changed[..., 7] += 1
    positions_BS = torch.arange(S)[None]
    before = model(tokens_BKS, positions_BS).hidden_KBSD[0]
    after = model(changed % 64, positions_BS).hidden_KBSD[0]
    # not bit for bit: a GEMM over another number of an expert's rows may add in another order
    assert relative(after[:, :7], before[:, :7]) < 1e-6
    assert relative(after[:, 7:8], before[:, 7:8]) > 1e-2


def test_sequences_do_not_see_each_other() -> None:
    model = make(small(num_mtp_layers=1))
    both = run(model)
    tokens_BKS = torch.randint(64, (2, 2, S), generator=torch.Generator().manual_seed(1))
    for b in range(2):
        alone = model(tokens_BKS[b : b + 1], torch.arange(S)[None])
        for whole, part in zip(both.hidden_KBSD, alone.hidden_KBSD, strict=True):
            assert relative(part[0], whole[b]) < 1e-5


def objective(output: ModelOutput) -> Tensor:
    return torch.stack([hidden.float().square().mean() for hidden in output.hidden_KBSD]).sum()


@pytest.mark.parametrize(("compute", "tolerance"), [(Compute.bf16, 0.1), (Compute.fp16, 0.0125)])
def test_half_precision_trains_close_to_fp32(compute: Compute, tolerance: float) -> None:
    """Every expert is chosen, so that rounding cannot turn a close decision into another path."""
    config = small(num_mtp_layers=1, top_k=8, top_k_groups=4)
    wide, narrow = make(config), make(config, compute=compute)
    wide.load_state_dict(narrow.state_dict())
    for model in (wide, narrow):
        output = run(model, balance_scale=0.5)
        assert all(hidden.dtype == torch_dtype(model_compute(model)) for hidden in output.hidden_KBSD)
        (objective(output) + model.head(output.hidden_KBSD[0]).float().square().mean()).backward()
    for (name, ours), expected in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None, name
        assert expected.grad is not None, name
        assert relative(ours.grad.float(), expected.grad) < tolerance, name


def model_compute(model: Transformer) -> Compute:
    return next(compute for compute in Compute if torch_dtype(compute) == model.embed.weight.dtype)


@pytest.mark.parametrize("recompute", Recompute)
def test_a_stage_boundary_switches_the_rotation(recompute: Recompute) -> None:
    config, yarn = small(num_mtp_layers=1), YarnConfig(factor=8, original_length=8)
    switched, fresh = make(config, recompute=recompute), make(config, yarn=yarn)
    plain = run(switched).hidden_KBSD[1]
    switched.set_yarn(yarn)
    assert torch.equal(run(switched).hidden_KBSD[1], run(fresh).hidden_KBSD[1])
    assert not torch.equal(run(switched).hidden_KBSD[1], plain)
    switched.set_yarn(None)
    assert torch.equal(run(switched).hidden_KBSD[1], plain)


def test_every_parameter_gets_a_gradient_even_if_experts_stay_idle() -> None:
    model = make(small(num_experts=32, num_groups=4, top_k=1))
    output = model(torch.zeros(1, 1, 2, dtype=torch.int64), torch.arange(2)[None])
    model.head(output.hidden_KBSD[0]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_token_and_one_layer_work() -> None:
    model = make(small(num_layers=1, num_dense_layers=0))
    output = model(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    assert output.hidden_KBSD[0].shape == (1, 1, 32)


def test_full_size_model_is_described_without_memory() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(), compute=Compute.bf16)
    main = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert main == pytest.approx(671.03e9, rel=1e-4)
    assert len(model.moe_layer_names()) == 59


def test_initialised_model_starts_near_the_uniform_loss() -> None:
    model = Transformer(small())
    initialize(model, seed=0)
    logits = model.head(run(model).hidden_KBSD[0])
    assert logits.log_softmax(-1).mean().item() == pytest.approx(-torch.tensor(64.0).log().item(), abs=0.05)
