"""Bytes that each rank really keeps, against the closed formulas of parallel/cost.py."""

from collections.abc import Iterable

import pytest
from torch import Tensor

from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig, PrecisionConfig
from parallel.cost import rank_memory
from parallel.mesh import build_mesh
from tests.distributed import run_ranks
from train.build import build_stage
from train.config import Moments, OptimizerConfig, RunConfig, StageConfig
from train.engines.zero1 import Zero1Engine
from train.parity.layouts import NamedLayout, parse
from train.parity.task import CPU

SEQ_LEN = 32
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=6,
    num_dense_layers=1,
    dense_intermediate_size=256,
    attention=AttentionConfig(
        num_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=64, num_groups=2, top_k_groups=1),
)
LAYOUTS = [
    "dp4",
    "dp4_replicate2",
    "ep4",
    "tp4",
    "pp2_ep2",
    "pp2_zbv_ep2",
    "dp2_tp2_ep2",
    "pp4_interleaved",
    "cp2_ep2_dp2",
]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory behind tensors, each piece of memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measured(rank: int, layouts: list[NamedLayout], compute: Compute) -> list[tuple[int, int, int, int]]:
    """Return pipeline rank and bytes of parameters, gradients and optimizer state under each layout."""
    found = []
    for named in layouts:
        config = RunConfig(
            device="cpu",
            model=MODEL,
            precision=PrecisionConfig(compute=compute),
            parallel=named.parallel,
            optimizer=OptimizerConfig(moments=Moments.bf16),
            stages={"one": StageConfig(seq_len=SEQ_LEN, num_tokens=1)},
        )
        mesh = build_mesh(named.layout, rank=rank)
        parts = build_stage(config, config.stages["one"], device=CPU, mesh=mesh)
        assert isinstance(parts.engine, Zero1Engine)
        parameters = list(parts.model.named_parameters().values())
        biases = [router.bias for router in parts.model.routers().values()]
        weights = storage_bytes(parameters)
        masters = storage_bytes([*parameters, *parts.engine.masters().values()]) - weights
        moments = storage_bytes(parts.engine.optimizer.moment_tensors())
        gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)
        found.append((mesh.pp.rank, weights + storage_bytes(biases), gradients, masters + moments))
    return found


@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_every_rank_keeps_what_the_formulas_say(compute: Compute) -> None:
    layouts = [parse(name) for name in LAYOUTS]
    by_rank = run_ranks(4, measured, layouts, compute)
    for index, named in enumerate(layouts):
        for pp_rank, *kept in (of_rank[index] for of_rank in by_rank):
            expected = rank_memory(
                MODEL,
                named.parallel,
                named.layout,
                compute=compute,
                moment_bytes=2,
                pp_rank=pp_rank,
                seq_len=SEQ_LEN,
            )
            predicted = (expected.parameters, expected.gradients, expected.optimizer)
            assert tuple(kept) == pytest.approx(predicted, rel=0.02), (named.name, pp_rank)
