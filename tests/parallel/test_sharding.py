"""The table: every parameter has its rule, and the initial pieces of all processes are the whole."""

import torch

from model.init import initialize
from model.transformer import Part, Transformer, whole
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh, single_process
from parallel.sharding import Sharding, Split, build_part, split_of
from tests.distributed import run_ranks
from tests.model.small import small

CONFIG = small(num_mtp_layers=1, num_heads=4, num_layers=4)


def test_every_kind_of_parameter_has_its_rule() -> None:
    names = [name for name, _ in Transformer(CONFIG).named_parameters()]
    names += [name for name, _ in Transformer(small(q_lora_rank=None)).named_parameters()]
    kinds = {name.split(".", 2)[-1] if name[0] in "lm" else name: split_of(name) for name in names}
    assert kinds["embed.weight"] is kinds["head.weight"] is Split.rows
    assert {kinds[f"attn.{w}.weight"] for w in ("wq", "wq_b", "wkv_b")} == {Split.rows}
    assert {kinds[f"attn.{w}.weight"] for w in ("wq_a", "wkv_a", "q_norm", "kv_norm")} == {Split.whole}
    assert {kinds[w] for w in ("ffn.gate.weight", "attn_norm.weight", "eh_proj.weight")} == {Split.whole}
    assert {kinds[f"ffn.experts.w{i}"] for i in "123"} == {Split.experts}
    for shared in ("ffn.", "ffn.shared_experts."):
        assert kinds[f"{shared}w1.weight"] is kinds[f"{shared}w3.weight"] is Split.rows
        assert kinds[f"{shared}w2.weight"] is Split.columns
    assert kinds["attn.wo.weight"] is Split.columns


def pieces(rank: int) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Return the initial parameters of this process with their offsets, under tp2 with ep2 in two stages."""
    mesh: Mesh = build_mesh(Layout(pp=2, tp=2, ep=2), rank=rank)
    first = mesh.pp.rank == 0
    part = Part(first=first, layers=range(0, 2) if first else range(2, 4), last=not first)
    sharding = Sharding(mesh=mesh, two_embeddings=True)
    model = build_part(CONFIG, part, sharding, device=torch.device("cpu"), seed=7)
    assert sharding.reduction("embed.weight") is mesh.ends
    held = {}
    for name, parameter in model.named_parameters():
        share = sharding.share(name)
        offsets = [0] * parameter.dim()
        offsets[share.dim] = share.index * parameter.shape[share.dim]
        held[name] = [(tuple(offsets), parameter.detach())]
    return held


def test_the_pieces_of_all_processes_are_the_whole() -> None:
    expected = Transformer(CONFIG)
    initialize(expected, seed=7)
    by_rank = run_ranks(4, pieces)
    for name, parameter in expected.named_parameters():
        covered = torch.zeros(parameter.shape, dtype=torch.bool)
        for offsets, piece in (box for held in by_rank for box in held.get(name, [])):
            place = tuple(slice(a, a + n) for a, n in zip(offsets, piece.shape, strict=True))
            assert torch.equal(piece, parameter[place]), name
            covered[place] = True
        assert covered.all(), name


def test_one_process_builds_the_model_itself() -> None:
    sharding = Sharding(mesh=single_process())
    built = build_part(CONFIG, whole(CONFIG), sharding, device=torch.device("cpu"), seed=3)
    expected = Transformer(CONFIG)
    initialize(expected, seed=3)
    theirs = expected.state_dict()
    assert built.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in built.state_dict().items())
    assert torch.equal(built.rope.inv_freq, expected.rope.inv_freq)
