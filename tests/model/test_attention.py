"""The attention core against sums written out, and against itself with the keys in another order."""

import torch
from torch import Tensor

from model.attention import LocalAttention, Memory, attention_by_position
from tests.model.small import relative

B, S, H, K, U = 2, 9, 3, 5, 4


def random_qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, S, H, width, generator=generator, requires_grad=True) for width in (K, K, U))
    return q, k, v


def attention_by_loops(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHU: Tensor, scale: float) -> Tensor:
    rows = []
    for b in range(B):
        for s in range(S):
            for h in range(H):
                scores = torch.stack([q_BSHK[b, s, h] @ k_BSHK[b, m, h] * scale for m in range(s + 1)])
                rows.append((scores.exp() / scores.exp().sum()) @ v_BSHU[b, : s + 1, h])
    return torch.stack(rows).view(B, S, H, U)


def results(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * direction).sum(), inputs)]


def test_local_attention_and_its_gradients_equal_the_definition() -> None:
    q, k, v = random_qkv()
    positions_BS = torch.arange(S).expand(B, -1)
    ours = LocalAttention().attend(
        q, k, v, q_positions_BS=positions_BS, k_positions_BM=positions_BS, scale=0.3
    )
    for got, expected in zip(
        results(ours, q, k, v), results(attention_by_loops(q, k, v, 0.3), q, k, v), strict=True
    ):
        assert relative(got, expected) < 1e-5


def test_keys_may_come_in_any_order_with_their_positions() -> None:
    q, k, v = random_qkv()
    positions_BS = torch.arange(S).expand(B, -1)
    order = torch.randperm(S, generator=torch.Generator().manual_seed(2))
    shuffled = LocalAttention().attend(
        q,
        k[:, order],
        v[:, order],
        q_positions_BS=positions_BS,
        k_positions_BM=positions_BS[:, order],
        scale=0.3,
    )
    for got, expected in zip(
        results(shuffled, q, k, v), results(attention_by_loops(q, k, v, 0.3), q, k, v), strict=True
    ):
        assert relative(got, expected) < 1e-5


def test_queries_may_be_a_part_of_the_sequence() -> None:
    q, k, v = random_qkv()
    part = attention_by_position(
        q[:, 4:7],
        k,
        v,
        q_positions_BS=torch.arange(4, 7).expand(B, -1),
        k_positions_BM=torch.arange(S).expand(B, -1),
        scale=0.3,
    )
    assert relative(part, attention_by_loops(q, k, v, 0.3)[:, 4:7]) < 1e-5


def test_one_device_gathers_nothing() -> None:
    memory = Memory(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))
    assert LocalAttention().gather(memory) is memory
