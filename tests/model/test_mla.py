"""Latent attention: written out head by head, and with the memory passing through another core."""

import math

import pytest
import torch
from torch import Tensor

from model.attention import LocalAttention, Memory
from model.config import Recompute, YarnConfig
from model.mla import MultiHeadLatentAttention
from model.rope import RotaryEmbedding
from tests.model.small import relative, small

B, S = 2, 11
YARN = YarnConfig(factor=4, original_length=8)


def make_attention(q_lora_rank: int | None, yarn: YarnConfig | None) -> MultiHeadLatentAttention:
    config = small(q_lora_rank=q_lora_rank, num_heads=3)
    attention = MultiHeadLatentAttention(config, dtype=torch.float32, yarn=yarn, recompute=Recompute.none)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 + 0.1
            )
    return attention


def inputs(yarn: YarnConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    x_BSD = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    positions_BS = torch.arange(S).expand(B, -1)
    return x_BSD, RotaryEmbedding(small().attention, yarn)(positions_BS), positions_BS


def rotate(x_SP: Tensor, table_S2F: Tensor) -> Tensor:
    turned = torch.view_as_complex(x_SP.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.complex(table_S2F[:, 0], table_S2F[:, 1])).flatten(-2)


def written_out(attention: MultiHeadLatentAttention, x_BSD: Tensor, table_BS2F: Tensor) -> Tensor:
    """Equations 1 to 11 of arXiv 2412.19437 for one sequence and one head at a time."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    a, sequences = attention, []
    width = a.nope + a.rope
    for x_SD, table_S2F in zip(x_BSD, table_BS2F, strict=True):
        if a.config.q_lora_rank is None:
            q_SX = x_SD @ a.wq.weight.T
        else:
            q_SX = norm(x_SD @ a.wq_a.weight.T, a.q_norm.weight) @ a.wq_b.weight.T
        compressed = x_SD @ a.wkv_a.weight.T
        latent_SC = norm(compressed[:, : a.config.kv_lora_rank], a.kv_norm.weight)
        k_rope_SP = rotate(compressed[:, a.config.kv_lora_rank :], table_S2F)
        heads = []
        for h in range(a.config.num_heads):
            q_SK = q_SX[:, h * width : (h + 1) * width]
            up = a.wkv_b.weight[h * (a.nope + a.value) : (h + 1) * (a.nope + a.value)]
            kv_SX = latent_SC @ up.T
            scores_SS = q_SK[:, : a.nope] @ kv_SX[:, : a.nope].T
            scores_SS = (scores_SS + rotate(q_SK[:, a.nope :], table_S2F) @ k_rope_SP.T) * a.scale
            hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
            heads.append(scores_SS.masked_fill(hidden, -math.inf).softmax(-1) @ kv_SX[:, a.nope :])
        sequences.append(torch.cat(heads, -1) @ a.wo.weight.T)
    return torch.stack(sequences)


def gradients(output: Tensor, attention: MultiHeadLatentAttention, x_BSD: Tensor) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((output * direction).sum(), [x_BSD, *attention.parameters()]))


@pytest.mark.parametrize("q_lora_rank", [12, None])
@pytest.mark.parametrize("yarn", [None, YARN])
def test_equals_the_equations_written_out(q_lora_rank: int | None, yarn: YarnConfig | None) -> None:
    attention = make_attention(q_lora_rank, yarn)
    x_BSD, table_BS2F, positions_BS = inputs(yarn)
    ours = attention(x_BSD, table_BS2F, positions_BS)
    expected = written_out(attention, x_BSD, table_BS2F)
    assert relative(ours, expected) < 1e-5
    ours_all, expected_all = gradients(ours, attention, x_BSD), gradients(expected, attention, x_BSD)
    for got, want in zip(ours_all, expected_all, strict=True):
        assert relative(got, want) < 1e-5


class ShufflingCore(LocalAttention):
    """Hands out the memory in another order, as a gather over devices with interleaved chunks would."""

    def gather(self, memory: Memory) -> Memory:
        order = torch.randperm(S, generator=torch.Generator().manual_seed(3))
        return Memory(memory.latent_BMC[:, order], memory.k_rope_BMP[:, order], memory.positions_BM[:, order])


def test_only_memory_passes_through_the_core() -> None:
    attention = make_attention(12, YARN)
    x_BSD, table_BS2F, positions_BS = inputs(YARN)
    plain = attention(x_BSD, table_BS2F, positions_BS)
    plain_gradients = gradients(plain, attention, x_BSD)
    attention.core = ShufflingCore()
    shuffled = attention(x_BSD, table_BS2F, positions_BS)
    assert relative(shuffled, plain) < 1e-5
    for got, want in zip(gradients(shuffled, attention, x_BSD), plain_gradients, strict=True):
        assert relative(got, want) < 1e-5
