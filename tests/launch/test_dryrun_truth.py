"""A dry run against real processes: what it says of a rank is what the rank really takes and sends.

Each layout takes a step on gloo processes. A dry run of the same rank is then given the counts of rows that
the process read, since random weights do not route evenly, and must say the same of memory and collectives.
"""

from dataclasses import replace

import pytest

from launch.dryrun.job import RankReport, Request
from launch.dryrun.memory import Kind
from launch.dryrun.rank import run_rank
from model.config import AttentionConfig, Compute, Gemm, ModelConfig, MoEConfig, PrecisionConfig, Recompute
from parallel.config import Context, Dispatcher, ParallelConfig
from tests.distributed import run_ranks
from tests.launch.real_step import Measured, measure
from train.config import BatchConfig, Moments, OptimizerConfig, RunConfig, StageConfig
from train.parity.layouts import parse

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=3,
    num_dense_layers=1,
    dense_intermediate_size=256,
    attention=AttentionConfig(
        num_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=64, num_groups=4, top_k_groups=2),
)


def request(
    layout: str = "",
    *,
    gemm: Gemm = Gemm.compute,
    compute: Compute = Compute.bf16,
    recompute: Recompute = Recompute.none,
    **changes: object,
) -> Request:
    """Return a job of one step under a layout with a name: two microbatches, in a pipeline four."""
    named = parse(layout) if layout else None
    parallel = named.parallel if named else ParallelConfig()
    microbatches = 4 if parallel.pp > 1 else 2
    return Request(
        config=RunConfig(
            device="cpu",
            model=MODEL,
            precision=PrecisionConfig(compute=compute, gemm=gemm),
            parallel=replace(parallel, recompute=recompute, microbatch_size=1, **changes),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(moments=Moments.bf16),
            stages={"one": StageConfig(seq_len=128, num_tokens=1, batch=BatchConfig(start=8, end=8))},
        ),
        stage="one",
        world_size=named.layout.world_size if named else 1,
        num_microbatches=microbatches,
        microbatches_of_step=microbatches,
    )


def cases(world_size: int) -> list[Request]:
    """Return the jobs of so many processes."""
    deepseek, core, full = Recompute.deepseek, Recompute.core, Recompute.full
    fp8 = Gemm.fp8_reference
    return {
        1: [request(), request(recompute=full), request(recompute=deepseek, gemm=fp8)],
        2: [
            request("tp2", recompute=deepseek),
            request("cp2", recompute=core, context=Context.ulysses),
            request("pp2_1f1b", compute=Compute.fp32),
        ],
        4: [
            request("ep4", recompute=deepseek, dispatcher=Dispatcher.two_hop, node_size=2),
            request("pp2_dualpipev_ep2", recompute=deepseek, gemm=fp8),
            request("pp2_zbv_ep2"),
        ],
        8: [
            request("pp2_dualpipev_ep4", recompute=deepseek, dispatcher=Dispatcher.two_hop, node_size=2),
            request("pp2_interleaved_tp2_cp2_ep2"),
        ],
    }[world_size]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_dry_run_tells_the_truth(world_size: int) -> None:
    jobs = cases(world_size)
    by_rank = run_ranks(world_size, measure, jobs)
    for index, job in enumerate(jobs):
        for rank in range(0, world_size, world_size // job.parallel.pp):  # the first of each pipeline rank
            real = by_rank[rank][index]
            counts = iter(real.counts)
            check(run_rank(job, rank, answers=lambda _, counts=counts: next(counts)), real, job)
            assert next(counts, None) is None


def check(dry: RankReport, real: Measured, job: Request) -> None:
    """Compare what a dry run says with what a process measured."""
    if job.config.precision.gemm is Gemm.compute:
        assert dry.codes < 1000  # the step's totals
    state = dry.state
    assert state[Kind.WEIGHTS] == real.weights
    assert state[Kind.GRADIENTS] == real.gradients
    assert state[Kind.OPTIMIZER] == real.optimizer
    assert dry.activations + dry.codes == pytest.approx(real.saved, rel=0.04), (job.parallel, real)
    said = {(each.operation, each.group): (each.calls, each.num_bytes) for each in dry.collectives}
    assert said == {key: (real.calls[key], real.num_bytes[key]) for key in real.calls}
