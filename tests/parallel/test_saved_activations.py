"""The closed form of saved activations on several processes: what each gathers or is sent, it keeps."""

import time
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo  # torch's checkpoint imports it at its first use, here once before processes fork
from torch import Tensor

from model.activations import Spread, microbatch_saved_bytes
from model.config import Compute, Gemm, PrecisionConfig, Recompute
from model.fp8 import Fp8Policy, install_fp8
from model.kernels.grouped_gemm import WINDOW_MULTIPLE
from model.transformer import Transformer, whole
from parallel.apply import parallelize
from parallel.config import ParallelConfig
from parallel.context import split_context
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.sharding import Sharding, build_part
from tests.distributed import GLOO_S, run_ranks
from tests.model.live_bytes import LiveBytes
from tests.model.small import small

B, S = 2, 96
CONFIG = small(
    hidden_size=160,
    dense_intermediate_size=288,
    intermediate_size=140,
    q_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_experts=4,
    num_groups=2,
)
LAYOUTS = {"tp": Layout(tp=2), "cp": Layout(cp=2), "ep": Layout(dp_shard=2, ep=2)}
FIRST = {"layers": range(CONFIG.num_layers), "first": True, "last": False}


@dataclass(frozen=True)
class Case:
    """fp8: every product, and with ep what is exchanged for the experts."""

    layout: str
    recompute: Recompute
    fp8: bool


CASES = [
    Case(layout, recompute, fp8) for layout in LAYOUTS for recompute in Recompute for fp8 in (False, True)
]


def coded_weights(model: Transformer) -> list[Tensor]:
    return [
        parameter
        for name, parameter in model.named_parameters()
        if (".attn." in name or ".ffn." in name) and parameter.dim() > 1 and "gate" not in name
    ]


def filling(load_LE: Tensor) -> int:
    """Return the bytes of gate, up and row weights that fill the rows of experts up to multiples of 64."""
    rows = int((-load_LE % WINDOW_MULTIPLE).sum())
    return rows * (2 * 2 * CONFIG.moe.intermediate_size + 4)


def measure(rank: int, case: Case) -> int:
    """Return the bytes that the graph of all layers holds, without the last norm and the filling of rows."""
    layout = LAYOUTS[case.layout]
    mesh = build_mesh(layout, rank=rank)
    part = whole(CONFIG)
    model = build_part(
        CONFIG,
        part,
        Sharding(mesh=mesh),
        device=torch.device("cpu"),
        seed=0,
        recompute=case.recompute,
        compute=Compute.bf16,
    )
    parallelize(model, mesh, ParallelConfig(recompute=case.recompute), fp8_dispatch=case.fp8)
    made_before: list[Tensor] = []
    if case.fp8:
        policy = Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference))
        install_fp8(model, policy)
        codes = [policy.weights.codes(w, power_of_two=False) for w in coded_weights(model)]
        made_before = [tensor for code in codes for tensor in (code.codes, code.scales)]
    generator = torch.Generator().manual_seed(0)
    tokens_BKS = torch.randint(64, (B, 1, S), generator=generator)
    tokens_BKS = split_context(tokens_BKS, dim=2, group=mesh.cp)
    positions_BS = split_context(torch.arange(S).expand(B, -1), dim=1, group=mesh.cp)
    with LiveBytes() as live:
        output = model(tokens_BKS, positions_BS, balance_scale=0.5)
    time.sleep(GLOO_S)
    last_norm = 2 * CONFIG.hidden_size * B * S // (mesh.tp.size * mesh.cp.size)
    live.forget(tokens_BKS, positions_BS, output.load_LE, output.balance_loss, *output.hidden_KBSD)
    live.forget(*model.parameters(), *model.buffers(), *made_before)
    load_LE = mesh.ep.all_reduce(output.load_LE.clone()).chunk(mesh.ep.size, 1)[mesh.ep.rank]
    fills = not case.fp8 and case.recompute is not Recompute.full
    return live.num_bytes - last_norm - (filling(load_LE) if fills else 0)


def measure_all(rank: int) -> list[int]:
    return [measure(rank, case) for case in CASES]


@pytest.fixture(scope="module")
def measured() -> dict[Case, float]:
    """Return the mean over processes: the experts of one have more rows than those of another."""
    of_rank = run_ranks(2, measure_all)
    return dict(zip(CASES, (sum(values) / 2 for values in zip(*of_rank, strict=True)), strict=True))


def spread(case: Case) -> Spread:
    rows = float(CONFIG.moe.top_k)
    return {
        "tp": Spread(sequence_shares=2, experts=0),  # no experts: rows without filling
        "cp": Spread(memory_tokens=2.0, experts=0),
        "ep": Spread(routed_rows=rows, arrived_rows=rows, coded_rows=case.fp8, experts=0),
    }[case.layout]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_closed_form_holds_on_several_processes(case: Case, measured: dict[Case, float]) -> None:
    predicted = microbatch_saved_bytes(
        CONFIG,
        **FIRST,
        tokens=B * S // LAYOUTS[case.layout].cp,
        recompute=case.recompute,
        compute=Compute.bf16,
        gemm=Gemm.fp8_reference if case.fp8 else Gemm.compute,
        spread=spread(case),
    )
    assert predicted == pytest.approx(measured[case], rel=0.02)
