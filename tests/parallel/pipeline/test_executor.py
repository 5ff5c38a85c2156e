"""Every schedule gives, over several processes, the gradients, losses and loads of one process.

Gradients are compared one by one: a wrong one hides behind a right loss. The embedding is held by the first
and the last rank, or shared by two stages of one rank; here the test adds up the two copies.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, Recompute
from model.transformer import moe_layer_names
from parallel.config import Schedule
from parallel.layout import Layout
from parallel.mesh import build_mesh, single_process
from tests.distributed import run_ranks
from tests.parallel.pipeline.models import (
    RankSchedule,
    batch_of,
    config_of,
    differences,
    gradients,
    one_process,
)

TOLERANCE = 1e-5


Case = tuple[str, int, Recompute, bool]
"""Schedule, sequences of the batch, recompute mode, overlap."""


def run_cases(
    rank: int, config: ModelConfig, layout: Layout, cases: list[Case], chunks: int, microbatch_size: int
) -> list[object]:
    mesh = build_mesh(layout, rank=rank)
    results = []
    for name, sequences, recompute, overlap in cases:
        runner = RankSchedule(
            config,
            mesh,
            Schedule(name),
            chunks=chunks,
            microbatch_size=microbatch_size,
            recompute=recompute,
            overlap=overlap,
        )
        share = sequences // layout.dp
        sums = runner.step(batch_of(sequences)[mesh.dp_rank * share :][:share])
        assert sorted(runner.reduced) == sorted(runner.chunks)
        found = gradients(runner.chunks.values(), mesh)
        losses_K = sums.loss_sums_K if mesh.tp.rank == 0 else torch.zeros(2)  # its peers compute the same
        results.append((found, losses_K, sums.balance_loss, sums.loads))
    return results


def add_up(per_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for found in per_rank:
        for name, tensor in found.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


def check(
    config: ModelConfig, layout: Layout, cases: list[Case], *, chunks: int = 2, microbatch_size: int = 1
) -> None:
    """Run all cases in one set of processes and compare each with one process."""
    per_rank = run_ranks(layout.world_size, run_cases, config, layout, cases, chunks, microbatch_size)
    for case, of_ranks in zip(cases, zip(*per_rank, strict=True), strict=True):
        model, expected = one_process(config, batch_of(case[1]), 1)
        ours = add_up([gradients for gradients, *_ in of_ranks])
        wrong = {n: d for n, d in differences(ours, gradients([model])).items() if not d < TOLERANCE}
        assert wrong == {}, case
        losses_K = torch.stack([loss_sums_K for _, loss_sums_K, _, _ in of_ranks]).sum(0)
        torch.testing.assert_close(losses_K.float(), expected.loss_sums_K, rtol=1e-6, atol=0)
        balance = torch.stack([balance_loss for _, _, balance_loss, _ in of_ranks]).sum() / case[1]
        torch.testing.assert_close(balance.float(), expected.balance_loss, rtol=1e-6, atol=0)
        loads = add_up([loads for *_, loads in of_ranks])
        assert torch.equal(torch.stack([loads[n] for n in moe_layer_names(config)]), expected.load_LE), case


PLAIN = Recompute.none


def test_two_ranks() -> None:
    cases = [(name, count, PLAIN, False) for name in Schedule for count in (4, 6)]
    cases += [("zbv", 4, recompute, False) for recompute in list(Recompute)[1:]]
    check(config_of(4), Layout(pp=2), cases)


def test_three_stages_per_rank() -> None:
    cases = [(name, 4, PLAIN, False) for name in ("interleaved", "interleaved_zb")]
    check(config_of(6), Layout(pp=2), cases, chunks=3)


def test_the_last_microbatch_may_be_smaller_on_its_way_between_ranks() -> None:
    check(
        config_of(4), Layout(pp=2), [(name, 5, PLAIN, False) for name in ("1f1b", "zbv")], microbatch_size=2
    )


def test_four_ranks() -> None:
    cases = [(name, 8, PLAIN, False) for name in Schedule]
    cases += [("dualpipev", 3, PLAIN, True), ("zbv", 3, PLAIN, False)]  # fewer than fill the pipeline
    check(config_of(8), Layout(pp=4), cases)


def test_experts_on_other_ranks_with_and_without_overlap() -> None:
    """DualPipeV over two ranks, whose experts are spread over two processes each."""
    cases = [("dualpipev", 8, recompute, True) for recompute in Recompute]
    cases += [("dualpipev", 8, PLAIN, False), ("zbv", 8, Recompute.full, True)]
    check(config_of(4), Layout(pp=2, dp_shard=2, ep=2), cases)


def test_tensor_parallel_ranks_send_their_own_tokens() -> None:
    """Hidden states between stages are half as long; the experts lie over the same two processes."""
    cases = [("dualpipev", 4, PLAIN, True), ("zbv", 4, Recompute.core, False)]
    check(config_of(4), Layout(pp=2, tp=2, ep=2), cases)


def test_one_process_may_run_a_pipeline_of_one_rank() -> None:
    """DualPipeV on one rank: nothing is sent, but forward and backward passes alternate."""
    check(config_of(4), Layout(), [("dualpipev", 4, PLAIN, True), ("interleaved_zb", 4, PLAIN, False)])


def test_steps_add_up_and_microbatches_may_differ_in_size() -> None:
    config, batch = config_of(4), batch_of(5)
    runner = RankSchedule(config, single_process(), Schedule.zbv, microbatch_size=2)
    runner.step(batch)
    runner.step(batch)
    model, _ = one_process(config, batch, 5)
    twice = {name: 2 * gradient for name, gradient in gradients([model]).items()}
    assert max(differences(gradients(runner.chunks.values()), twice).values()) < TOLERANCE


def test_loss_scale_scales_every_gradient_and_no_loss() -> None:
    """The balance loss enters in every stage, the cross-entropy in the last: both have to be scaled."""
    config, batch, scale = config_of(4), batch_of(4), 1024.0
    runner = RankSchedule(config, single_process(), Schedule.zbv)
    sums = runner.step(batch, loss_scale=scale)
    model, expected = one_process(config, batch, 4)
    scaled = {name: scale * gradient for name, gradient in gradients([model]).items()}
    assert max(differences(gradients(runner.chunks.values()), scaled).values()) < TOLERANCE
    torch.testing.assert_close(sums.loss_sums_K.float(), expected.loss_sums_K, rtol=1e-6, atol=0)


def test_without_mtp_tokens_its_depths_stay_out() -> None:
    runner = RankSchedule(config_of(4), single_process(), Schedule.dualpipev, overlap=True)
    batch = batch_of(2)
    sums = runner.step(
        replace(
            batch,
            tokens_BKS=batch.tokens_BKS[:, :1],
            labels_BKS=batch.labels_BKS[:, :1],
            valid_K=batch.valid_K[:1],
        )
    )
    assert list(sums.loads) == ["layers.1", "layers.2", "layers.3"]
    assert sums.loss_sums_K.shape == (1,)


def test_an_error_names_rank_and_action() -> None:
    runner = RankSchedule(config_of(4), single_process(), Schedule.zbv)
    broken = batch_of(2)
    broken.tokens_BKS[1] = 64  # one more than the vocabulary has
    with pytest.raises(IndexError) as caught:
        runner.step(broken)
    assert caught.value.__notes__ == ["pipeline rank 0, action 0F1"]
