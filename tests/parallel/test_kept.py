"""The activations that plans predict against dry runs of the same ranks, where weight gradients are put off.

A dry run (launch/dryrun/rank.py) takes the real step with tensors that have no memory, and routes evenly.
What it holds at its peak, or at the end of a forward pass, is compared: the larger of the two.
"""

import pytest

from launch.dryrun.job import Request
from launch.dryrun.memory import Kind
from launch.dryrun.rank import run_rank
from model.config import AttentionConfig, Gemm, ModelConfig, MoEConfig, PrecisionConfig, Recompute
from parallel.config import ParallelConfig, Schedule
from parallel.planner import Plan
from tests.parallel.planned import task
from train.config import BatchConfig, Moments, OptimizerConfig, RunConfig, StageConfig

PP, SEQ_LEN, NUM_MICROBATCHES = 4, 4096, 8
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    num_layers=8,
    num_dense_layers=1,
    dense_intermediate_size=1024,
    attention=AttentionConfig(
        num_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
    moe=MoEConfig(num_experts=4, top_k=4, intermediate_size=512, num_groups=1, top_k_groups=1),
)


def request(schedule: Schedule, recompute: Recompute, gemm: Gemm) -> Request:
    """Return a job of one process for each pipeline rank, of as many microbatches as show its peak."""
    parallel = ParallelConfig(pp=PP, schedule=schedule, recompute=recompute)
    batch = BatchConfig(start=NUM_MICROBATCHES, end=NUM_MICROBATCHES)
    return Request(
        config=RunConfig(
            device="cpu",
            model=MODEL,
            precision=PrecisionConfig(gemm=gemm),
            parallel=parallel,
            optimizer=OptimizerConfig(moments=Moments.bf16),
            stages={"one": StageConfig(seq_len=SEQ_LEN, num_tokens=1, batch=batch)},
        ),
        stage="one",
        world_size=PP,
        num_microbatches=NUM_MICROBATCHES,
        microbatches_of_step=NUM_MICROBATCHES,
    )


BF16, FP8 = Gemm.compute, Gemm.fp8_reference
CASES = [
    ("dualpipev", Recompute.deepseek, BF16, (3,)),
    ("dualpipev", Recompute.core, FP8, (2,)),
    ("zbv", Recompute.deepseek, BF16, (0, 3)),
    ("zbv", Recompute.none, FP8, (3,)),
    ("interleaved_zb", Recompute.deepseek, BF16, (1,)),
]


@pytest.mark.parametrize(("schedule", "recompute", "gemm", "ranks"), CASES)
def test_a_plan_keeps_what_a_dry_run_keeps(
    schedule: str, recompute: Recompute, gemm: Gemm, ranks: tuple[int, ...]
) -> None:
    """Within 5 %; to the dry run an input that is recomputed for a weight gradient is an activation, too."""
    job = request(Schedule(schedule), recompute, gemm)
    asked = task(
        model=MODEL,
        precision=job.config.precision,
        world_size=PP,
        seq_len=SEQ_LEN,
        batch_sizes=(NUM_MICROBATCHES,),
    )
    memory = Plan(asked, job.parallel).memory
    for rank in ranks:
        report = run_rank(job, rank)
        measured = max(report.activations, report.peak.by_kind[Kind.ACTIVATIONS])
        predicted = memory[rank].activations + memory[rank].recomputed
        assert predicted == pytest.approx(measured, rel=0.05), rank
        assert memory[rank].state.codes == pytest.approx(report.codes, rel=0.001, abs=100), rank
