"""Initial weights depend on seed and name, and on nothing else."""

import pytest
import torch

from model.config import Compute
from model.experts import Experts
from model.init import draw, fill_experts, initialize
from model.transformer import Transformer
from tests.model.small import small


def weights(seed: int, compute: Compute = Compute.fp32, **changes: object) -> dict[str, torch.Tensor]:
    model = Transformer(small(num_mtp_layers=1, **changes), compute=compute)
    initialize(model, seed=seed)
    return model.state_dict()


def test_normal_matrices_unit_norms_zero_bias() -> None:
    config = small(vocab_size=512, hidden_size=64, init_std=0.006)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialize(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            # the mean and the deviation of n draws stray by 1 / sqrt(n), here up to 4 times that
            stray = 4 / parameter.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(0.006, rel=stray), name
            assert abs(parameter.mean().item()) < 0.006 * stray, name
    assert all(router.bias.eq(0).all() for router in model.routers().values())


def test_values_do_not_depend_on_the_rest_of_the_model() -> None:
    whole, part = weights(3), weights(3, num_layers=2)
    for name in set(whole) & set(part):
        assert torch.equal(whole[name], part[name]), name
    assert len(set(whole) & set(part)) > 20


def test_values_do_not_depend_on_the_storage_type() -> None:
    wide, narrow = weights(3), weights(3, Compute.bf16)
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


def test_seeds_and_names_give_different_values() -> None:
    first, second = weights(3), weights(4)
    matrices = [name for name in first if first[name].dim() > 1]
    assert all(not torch.equal(first[name], second[name]) for name in matrices)
    assert len({first[name].flatten()[0].item() for name in matrices}) == len(matrices)


def test_an_expert_is_drawn_alone() -> None:
    config = small(init_std=0.02)
    model = Transformer(config)
    initialize(model, seed=7)
    name, part = "layers.1.ffn.experts.w2", Experts(config.moe, config.hidden_size, dtype=torch.float32)
    whole = model.state_dict()[name]
    alone = draw(name, tuple(whole.shape[1:]), seed=7, std=0.02, expert=5)
    assert torch.equal(whole[5], alone)
    local = torch.nn.Parameter(part.w2.data[:3].clone())
    fill_experts(local, name, seed=7, std=0.02, first_expert=4)
    assert torch.equal(local, whole[4:7])


def test_values_stay_the_same_across_releases() -> None:
    """A recorded draw: another value here means that no earlier run can be repeated."""
    assert draw("layers.0.attn.wo.weight", (2, 3), seed=0, std=1.0).flatten().tolist() == pytest.approx(
        RECORDED, abs=1e-6
    )


RECORDED = [0.239166, 0.868477, -0.564366, -0.084772, -0.507454, 0.127971]
