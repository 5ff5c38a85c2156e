"""Memory in closed form against the parameters of real models, cut as the table of splits says."""

from dataclasses import replace
from math import prod

import pytest
import torch

from model.config import Compute, Gemm, ModelConfig, PrecisionConfig
from model.cost import (
    gradient_bytes,
    mtp_parameters,
    optimizer_bytes,
    parameter_bytes,
    parameters,
)
from model.fp8 import Fp8Policy, install_fp8
from model.transformer import Part, Transformer
from parallel.checks import layout_of
from parallel.config import Engine, Offload, ParallelConfig, Schedule
from parallel.cost import RankMemory, rank_memory
from parallel.layout import Layout, axis_groups, coordinates, end_groups
from parallel.placement import assign_layers, count_stages
from parallel.sharding import Split, split_of
from tests.model.live_bytes import LiveBytes
from tests.model.small import small

# Sizes that every degree below divides, so that no shard is rounded up.
MODEL = small(
    num_layers=5,
    num_mtp_layers=1,
    num_heads=4,
    hidden_size=64,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    vocab_size=128,
    num_experts=16,
    intermediate_size=16,
)
SEQ_LEN = 64

LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "dp": (4, ParallelConfig(ep=2)),
    "replicas": (8, ParallelConfig(dp_replicate=2, ep=2)),
    "tp": (4, ParallelConfig(tp=2, ep=4)),
    "pp": (4, ParallelConfig(pp=2, ep=2)),
    "pp of three": (6, ParallelConfig(pp=3, tp=2, ep=2)),
    "V": (4, ParallelConfig(pp=2, schedule=Schedule("zbv"), ep=2)),
    "loops": (2, ParallelConfig(pp=2, schedule=Schedule("interleaved"), chunks=2)),
    "all": (16, ParallelConfig(pp=2, dp_replicate=2, cp=2, tp=2, ep=4)),
    "by hand": (2, ParallelConfig(pp=2, layers_per_stage=[4, 1])),
}


def memory(
    model: ModelConfig, parallel: ParallelConfig, world_size: int, pp_rank: int, **more: object
) -> RankMemory:
    settings: dict[str, object] = {"compute": Compute.bf16, "moment_bytes": 2, "seq_len": SEQ_LEN} | more
    layout = layout_of(parallel, world_size)
    return rank_memory(model, parallel, layout, pp_rank=pp_rank, **settings)  # type: ignore[arg-type]


def stages_by_hand(parallel: ParallelConfig, pp_rank: int) -> list[int]:
    num_stages = count_stages(parallel)
    if parallel.schedule == "zbv":
        return [pp_rank, num_stages - 1 - pp_rank]
    return list(range(pp_rank, num_stages, parallel.pp))


def weights_of(
    model: ModelConfig, parallel: ParallelConfig, pp_rank: int, compute: Compute
) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a pipeline rank, each once, from models built for its stages."""
    num_stages = count_stages(parallel)
    placed = assign_layers(model, SEQ_LEN, num_stages, layers_per_stage=parallel.layers_per_stage)
    found: dict[str, torch.Tensor] = {}
    for stage in stages_by_hand(parallel, pp_rank):
        part = Part(first=stage == 0, layers=placed[stage], last=stage == num_stages - 1)
        with torch.device("meta"):
            found |= Transformer(model, part=part, compute=compute).state_dict()
    return found


def group_size(layout: Layout, name: str, rank: int, *, copied: bool) -> int:
    """Return over how many processes the optimizer state of a parameter is cut, by listing them."""
    dense, experts = layout.dense_axes, layout.expert_axes
    split = split_of(name)
    if name == "embed.weight" and copied:
        groups = end_groups(layout)
    elif split is Split.experts:
        groups = axis_groups(experts, ("edp_shard",))
    elif split is Split.whole:
        groups = axis_groups(dense, ("dp_shard", "cp", "tp"))
    else:
        groups = axis_groups(dense, ("dp_shard", "cp"))
    (mine,) = [group for group in groups if rank in group]
    return len(mine)


def enumerated(
    model: ModelConfig, parallel: ParallelConfig, layout: Layout, rank: int, compute: Compute
) -> RankMemory:
    """Add up one rank's memory tensor by tensor, for zero1 with moments of 2 bytes."""
    pp_rank = coordinates(layout.dense_axes, rank)["pp"]
    copied = layout.pp > 1 and parallel.schedule != "zbv" and model.num_mtp_layers > 0
    parameters = gradients = optimizer = 0
    for name, tensor in weights_of(model, parallel, pp_rank, compute).items():
        cut = {Split.experts: layout.ep, Split.whole: 1}.get(split_of(name), layout.tp)
        if name.endswith("gate.bias"):  # a buffer
            parameters += 4 * tensor.numel()
            continue
        count = prod(tensor.shape) // cut
        shard = count // group_size(layout, name, rank, copied=copied)
        master = 0 if tensor.dtype == torch.float32 else 4
        parameters += tensor.element_size() * count
        gradients += 4 * count
        optimizer += (master + 4) * shard
    return RankMemory(parameters=parameters, gradients=gradients, optimizer=optimizer)


@pytest.mark.parametrize("compute", [Compute.bf16, Compute.fp32])
@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_holds_what_its_parameters_take(world_size, parallel, mtp, compute):
    model = replace(MODEL, num_mtp_layers=mtp)
    layout = layout_of(parallel, world_size)
    for rank in range(world_size):
        pp_rank = coordinates(layout.dense_axes, rank)["pp"]
        expected = enumerated(model, parallel, layout, rank, compute)
        assert memory(model, parallel, world_size, pp_rank, compute=compute) == expected


def is_coded(name: str) -> bool:
    """Return whether a weight is multiplied in FP8: all matrices inside blocks but the gate."""
    return (".attn." in name or ".ffn." in name) and "norm" not in name and ".gate." not in name


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_codes_are_of_what_a_rank_multiplies_by(world_size, parallel):
    layout = layout_of(parallel, world_size)
    for pp_rank in range(parallel.pp):
        weights = 0
        for name, tensor in weights_of(MODEL, parallel, pp_rank, Compute.bf16).items():
            cut = {Split.experts: layout.ep, Split.whole: 1}.get(split_of(name), layout.tp)
            weights += prod(tensor.shape) // cut if is_coded(name) else 0
        one_copy = weights + 4 * weights // 128**2
        for gemm, copies in ((Gemm.compute, 0), (Gemm.fp8_reference, 1), (Gemm.fp8_triton, 2)):
            assert memory(MODEL, parallel, world_size, pp_rank, gemm=gemm).codes == copies * one_copy


def test_codes_are_those_that_a_step_makes():
    """But for the scales of blocks at the edges; whatever ZeRO cuts, products are of whole weights."""
    model, policy = Transformer(MODEL, compute=Compute.bf16), Fp8Policy(PrecisionConfig())
    install_fp8(model, policy)
    with LiveBytes() as live:
        output = model(torch.zeros(1, 2, 8, dtype=torch.int64), torch.arange(8)[None])
        del output
    live.forget(*model.parameters(), *model.buffers())
    made = live.num_bytes
    policy.weights.forget()
    assert live.num_bytes == 0
    held = memory(MODEL, ParallelConfig(), 1, 0, gemm=Gemm.fp8_reference)
    assert held.codes == pytest.approx(made, rel=0.01)
    assert held.total == memory(MODEL, ParallelConfig(), 1, 0).total + held.codes
    stage_3 = ParallelConfig(engine=Engine.deepspeed, zero_stage=3)
    assert memory(MODEL, stage_3, 4, 0, gemm=Gemm.fp8_reference).codes == held.codes


def test_one_process_holds_the_model():
    held = memory(MODEL, ParallelConfig(), 1, 0)
    assert held.parameters == parameter_bytes(MODEL, compute=Compute.bf16)
    assert held.gradients == gradient_bytes(MODEL)
    assert held.optimizer == optimizer_bytes(MODEL, compute=Compute.bf16, moment_bytes=2)
    assert held.total == held.parameters + held.gradients + held.optimizer


def test_pipeline_ranks_hold_the_model_together():
    """Without MTP nothing is held twice."""
    model = replace(MODEL, num_mtp_layers=0)
    for schedule, pp in (("1f1b", 3), ("zbv", 2)):
        parallel = ParallelConfig(pp=pp, schedule=Schedule(schedule))
        held = [memory(model, parallel, pp, rank) for rank in range(pp)]
        assert sum(each.parameters for each in held) == parameter_bytes(model, compute=Compute.bf16)
        assert sum(each.gradients for each in held) == gradient_bytes(model)
        assert sum(each.optimizer for each in held) == optimizer_bytes(
            model, compute=Compute.bf16, moment_bytes=2
        )


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_optimizer_state_is_held_once_in_each_replica(world_size, parallel):
    """Also that of an embedding with two copies, whose state is cut over both ends."""
    layout = layout_of(parallel, world_size)
    ranks_each = world_size // layout.pp
    total = sum(ranks_each * memory(MODEL, parallel, world_size, rank).optimizer for rank in range(layout.pp))
    assert layout.edp_replicate == layout.dp_replicate
    assert total == layout.dp_replicate * optimizer_bytes(MODEL, compute=Compute.bf16, moment_bytes=2)


def test_deepspeed_stages_cut_more_and_more():
    def held(**settings: object) -> RankMemory:
        return memory(MODEL, ParallelConfig(engine=Engine.deepspeed, **settings), 4, 0)  # type: ignore[arg-type]

    one, two, three = (held(zero_stage=stage) for stage in (1, 2, 3))
    count = gradient_bytes(MODEL) // 4
    biases = 4 * 5 * 16  # four routers of the decoder and the MTP module's, 16 experts
    assert one.optimizer == two.optimizer == three.optimizer == (4 + 2 * 2) * count // 4
    assert (one.gradients, two.gradients, three.gradients) == (4 * count, count, count)
    assert one.parameters == two.parameters == parameter_bytes(MODEL, compute=Compute.bf16)
    parts = parameters(MODEL) + mtp_parameters(MODEL)
    kept_whole = 2 * parts.head + 4 * (parts.norms + parts.gate)
    assert three.parameters - biases == (one.parameters - biases) // 4 + kept_whole
    assert (one.buffers, two.buffers, three.buffers) == (0, 0, 4 << 26)
    offloaded = held(zero_stage=2, offload=Offload.cpu)
    assert (offloaded.optimizer, offloaded.offloaded) == (0, two.optimizer)
    assert offloaded.total == two.total - two.optimizer


def test_deepseek_v3_fits_its_devices():
    """On 2048 devices: 16 pipeline ranks, experts over 64; before activations, of 80 GB."""
    parallel = ParallelConfig(pp=16, ep=64, schedule=Schedule("dualpipev"))
    held = [memory(ModelConfig(), parallel, 2048, rank, seq_len=4096) for rank in range(16)]
    assert max(each.total for each in held) == held[0].total  # both ends of the V
    assert 15e9 < held[0].total < 25e9
    assert all(8e9 < each.total < 15e9 for each in held[1:])
