"""The mistakes that composed layouts make, made on purpose: the matrix has to notice every one of them.

Each leaves the first step's loss as it is, so a comparison of losses alone would pass.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import Memory
from parallel import context
from parallel.bucket import Bucket
from parallel.config import ParallelConfig
from parallel.forked import run_ranks
from parallel.groups import Group, Pending
from parallel.layout import Layout
from parallel.mesh import Reduction
from parallel.schedule import LocalSums
from parallel.sharding import Sharding
from train.parity.compare import TOLERANCE, Row, compare
from train.parity.layouts import parse
from train.parity.task import Record, run_task

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def reference() -> Record:
    return run_task(0, Layout(), ParallelConfig())


def row_of(name: str, reference: Record) -> Row:
    """Run a layout in processes that inherit what was patched in this one."""
    layout = parse(name)
    return compare(name, run_ranks(layout.world_size, run_task, layout.layout, layout.parallel), reference)


class _OwnGradientOnly(torch.autograd.Function):
    """Gather rows, but leave out the other ranks' share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size)[ctx.group.rank], None


def drop_the_rotary_keys_reduction(patch: Patch) -> None:
    """The key part that all heads share gets the gradient of this rank's heads alone."""
    gather = context.gather_memory

    def sabotaged(memory: Memory, group: Group) -> tuple[Tensor, Tensor]:
        latent_BSC, _ = gather(memory, group)
        rows: Any = _OwnGradientOnly.apply(memory.k_rope_BMP, group)
        return latent_BSC, rows.unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1, 2)

    patch.setattr(context, "gather_memory", sabotaged)


def halve_the_shared_embedding(patch: Patch) -> None:
    """The table that both ends of the pipeline share is divided by the number of its owners."""
    finish = Bucket.finish_reduce

    def sabotaged(self: Bucket, pending: Pending) -> None:
        finish(self, pending)
        for slot in self.slots:
            if slot.name == "embed.weight":
                slot.view(self.grad).div_(2)

    patch.setattr(Bucket, "finish_reduce", sabotaged)


def count_loads_twice(patch: Patch) -> None:
    """Every choice is counted again, as recomputation would."""
    of = LocalSums.of

    def sabotaged(*args: Any) -> LocalSums:
        sums = of(*args)
        doubled = {name: 2 * load for name, load in sums.loads.items()}
        return LocalSums(loss_sums_K=sums.loss_sums_K, balance_loss=sums.balance_loss, loads=doubled)

    patch.setattr(LocalSums, "of", staticmethod(sabotaged))


def count_replicas_twice(patch: Patch) -> None:
    """The gradient norm takes every copy of a sharded gradient for another one."""
    square_sum = Bucket.square_sum
    patch.setattr(Bucket, "square_sum", lambda self: square_sum(self) * self.reduction.replicate.size)


def _reduced_as(pattern: str, choose: Callable[[Sharding], Reduction]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        reduction = Sharding.reduction

        def sabotaged(self: Sharding, name: str) -> Reduction:
            return choose(self) if name.endswith(pattern) else reduction(self, name)

        patch.setattr(Sharding, "reduction", sabotaged)

    return apply


leave_the_gates_partial = _reduced_as("gate.weight", lambda sharding: sharding.mesh.dense)
"""Gates see only their own tokens under tensor parallelism; their gradient is not summed over tp."""

leave_the_embeddings_apart = _reduced_as("embed.weight", lambda sharding: sharding.mesh.dense)
"""The two copies of the embedding keep their own gradients."""

sum_experts_like_dense_weights = _reduced_as("experts.w1", lambda sharding: sharding.mesh.dense)
"""Different experts are added up."""


@pytest.mark.parametrize(
    ("layout", "sabotage", "blames"),
    [
        ("tp2", drop_the_rotary_keys_reduction, "gradient"),
        ("cp2", drop_the_rotary_keys_reduction, "gradient"),
        ("pp2_zbv", halve_the_shared_embedding, "gradient"),
        ("pp2_1f1b", halve_the_shared_embedding, "gradient"),
        ("pp2_1f1b", leave_the_embeddings_apart, "gradient"),
        ("ep2", count_loads_twice, "load"),
        ("dp4_replicate2", count_replicas_twice, "grad_norm"),
        ("tp2", leave_the_gates_partial, "gradient"),
        ("ep2", sum_experts_like_dense_weights, "gradient"),
    ],
)
def test_the_matrix_notices(
    layout: str,
    sabotage: Callable[[Patch], None],
    blames: str,
    reference: Record,
    monkeypatch: Patch,
) -> None:
    sabotage(monkeypatch)
    row = row_of(layout, reference)
    assert not row.passed
    match blames:
        case "gradient":
            assert row.gradient.distance > 100 * TOLERANCE
        case "grad_norm":
            assert row.grad_norm > 100 * TOLERANCE
        case _:
            assert not row.load
