"""Attention over sequences spread over cp (and tp) against one process, every gradient included."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from model.attention import AttentionCore, LocalAttention, Memory
from model.config import Recompute
from model.recompute import core_region, saving
from parallel.context import (
    GatheredAttention,
    in_part_order,
    in_sequence_order,
    split_context,
    zigzag_chunks,
)
from parallel.groups import Group
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.ulysses import UlyssesAttention
from tests.distributed import run_ranks
from tests.model.kernels.compare import relative_error

B, M, H, C = 2, 48, 8, 12
NOPE, ROPE, VALUE = 8, 4, 6
SCALE = 0.4


@dataclass
class Problem:
    """Inputs of the attention, and the gradient of its output."""

    q_BMHK: Tensor
    latent_BMC: Tensor
    k_rope_BMP: Tensor
    wkv_b_HXC: Tensor
    dout_BMHU: Tensor


def problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, M, H, NOPE + ROPE), (B, M, C), (B, M, ROPE), (H, NOPE + VALUE, C), (B, M, H, VALUE)]
    return Problem(*(torch.randn(shape, generator=generator) for shape in shapes))


def run(
    core: AttentionCore,
    part: Problem,
    positions_BS: Tensor,
    own_positions: Tensor,
    recompute: Recompute = Recompute.none,
) -> list[Tensor]:
    """Return the output, and the gradients of q, latent, k_rope and wkv_b, as MLA calls the core."""
    leaves = [part.q_BMHK, part.latent_BMC, part.k_rope_BMP, part.wkv_b_HXC]
    q_BSHK, latent, k_rope, wkv_b_HXC = leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    memory = core.gather(Memory(latent, k_rope, own_positions))
    kv_BMHX = torch.einsum("bmc,hxc->bmhx", memory.latent_BMC, wkv_b_HXC)
    nope_BMHN, v_BMHU = kv_BMHX.split((NOPE, VALUE), dim=-1)
    k_rope_BMHP = memory.k_rope_BMP[:, :, None].expand(-1, -1, nope_BMHN.shape[2], -1)
    k_BMHK = torch.cat((nope_BMHN, k_rope_BMHP), dim=-1)
    places = {"q_positions_BS": positions_BS, "k_positions_BM": memory.positions_BM}
    assert memory.positions_BM.shape == memory.latent_BMC.shape[:2]
    attend = partial(core.attend, scale=SCALE, **places)
    with saving(recompute):
        out_BSHU = core_region(recompute, attend, q_BSHK, k_BMHK, v_BMHU) * 1
    return [out_BSHU.detach(), *torch.autograd.grad(out_BSHU, leaves, part.dout_BMHU)]


def check(core: AttentionCore, mesh: Mesh, seed: int, recompute: Recompute = Recompute.none) -> None:
    """Compare this rank's part of everything with the whole problem solved here."""
    whole = problem(seed)
    positions_BM = torch.arange(M).expand(B, -1)
    expected = run(LocalAttention(), whole, positions_BM, positions_BM)
    heads = slice(mesh.tp.rank * H // mesh.tp.size, (mesh.tp.rank + 1) * H // mesh.tp.size)

    def own_part(x_BM: Tensor) -> Tensor:
        return split_context(x_BM, dim=1, group=mesh.cp)

    def own_tokens(x_BM: Tensor) -> Tensor:
        return own_part(x_BM).chunk(mesh.tp.size, 1)[mesh.tp.rank]

    part = Problem(
        q_BMHK=own_part(whole.q_BMHK)[:, :, heads],
        latent_BMC=own_tokens(whole.latent_BMC),
        k_rope_BMP=own_tokens(whole.k_rope_BMP),
        wkv_b_HXC=whole.wkv_b_HXC[heads],
        dout_BMHU=own_part(whole.dout_BMHU)[:, :, heads],
    )
    results = run(core, part, own_part(positions_BM), own_tokens(positions_BM), recompute)
    mesh.cp.all_reduce(results[4])  # each part of the sequence adds to the gradient of the weight
    wanted = [
        own_part(expected[0])[:, :, heads],
        own_part(expected[1])[:, :, heads],
        own_tokens(expected[2]),
        own_tokens(expected[3]),
        expected[4][heads],
    ]
    for name, mine, theirs in zip(("out", "q", "latent", "k_rope", "wkv_b"), results, wanted, strict=True):
        assert mine.shape == theirs.shape, name
        assert relative_error(mine, theirs) < 2e-6, f"{type(core).__name__} {mesh.layout} {name}"


LAYOUTS = [
    Layout(dp_shard=2, cp=2),
    Layout(cp=4),
    Layout(cp=2, tp=2),
    Layout(dp_shard=2, tp=2),
]


def cases(rank: int) -> list[str]:
    done = []
    for seed, layout in enumerate(LAYOUTS):
        mesh = build_mesh(layout, rank=rank)
        calls: list[str] = []
        mesh.trace.listeners.append(lambda call, calls=calls: calls.append(call.operation))
        gathered = GatheredAttention(mesh.sequence, cp=mesh.cp.size, cp_rank=mesh.cp.rank)
        check(gathered, mesh, seed)
        # one gather of latents, its gradient, and the sum of the weight's gradient made by the test
        assert calls == ["all_gather", "reduce_scatter", *["all_reduce"] * (mesh.cp.size > 1)]
        check(UlyssesAttention(mesh.tp, mesh.cp), mesh, seed)
        assert calls.count("all_to_all") == 4 * (mesh.cp.size > 1)
        check(gathered, mesh, seed, Recompute.core)
        assert calls.count("all_to_all") == 4 * (mesh.cp.size > 1)
        check(UlyssesAttention(mesh.tp, mesh.cp), mesh, seed, Recompute.core)
        assert calls.count("all_to_all") == 10 * (mesh.cp.size > 1)  # the recomputation sends again
        memory = Memory(torch.zeros(1, 6, C), torch.zeros(1, 6, ROPE), torch.zeros(1, 6))
        gathered_M = gathered.gather(memory).positions_BM[0]
        assert torch.equal(gathered_M, torch.arange(6 * mesh.sequence.size))
        done.append(str(layout))
    return done


def test_attention_over_parts_equals_one_process():
    assert run_ranks(4, cases) == [[str(layout) for layout in LAYOUTS]] * 4


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_share_the_chunks_and_the_work(parts: int):
    held = [zigzag_chunks(parts, part) for part in range(parts)]
    assert sorted(chunk for both in held for chunk in both) == list(range(2 * parts))
    assert {sum(both) for both in held} == {2 * parts - 1}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_side_by_side_are_the_sequence(parts: int):
    x = torch.arange(2 * 12 * 3).view(2, 12, 3)
    groups = [Group("cp", range(parts), rank=part) for part in range(parts)]
    spread = torch.cat([split_context(x, dim=1, group=group) for group in groups], 1)
    assert torch.equal(in_sequence_order(spread, parts), x)
    assert torch.equal(in_part_order(x, parts), spread)


def test_a_sequence_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 equal chunks"):
        split_context(torch.zeros(2, 10), dim=1, group=Group("cp", (0, 1)))


def test_alone_nothing_is_copied():
    memory = Memory(torch.zeros(1, 5, C), torch.zeros(1, 5, ROPE), torch.arange(5)[None])
    for core in (
        GatheredAttention(Group("sequence"), cp=1, cp_rank=0),
        UlyssesAttention(Group("tp"), Group("cp")),
    ):
        assert core.gather(memory) is memory
