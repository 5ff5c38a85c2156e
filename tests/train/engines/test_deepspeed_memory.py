"""What a process holds under the deepspeed engine: weights, gradients and optimizer state, each once."""

import gc
from weakref import ref

import pytest
from torch import Tensor

from parallel.config import ParallelConfig
from parallel.cost import DEEPSPEED_BUCKET_ELEMENTS, rank_memory
from parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tests.train.engines.runs import DP2, STAGES, batch_of, build, config_of, passes, update
from train.build import StageParts
from train.config import Moments
from train.parity.task import PLAIN


def live_bytes(parts: list[StageParts]) -> int:
    """Return the bytes of all tensors of this process, gradients of parameters included."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    for part in parts:
        tensors += [p.grad for p in part.model.named_parameters().values() if p.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(rank: int, parallel: ParallelConfig) -> tuple[list[int], list[str]]:
    """Return what a process holds, and experts that stayed whole in a backward pass.

    What it holds: weights and optimizer state between steps, gradients after the passes of one.
    """
    mesh = build_mesh(DP2, rank=rank)
    batch = batch_of(mesh, 1)
    before = live_bytes([])
    parts = build(mesh, config_of(parallel))
    named = parts.model.named_parameters()
    passes(parts)
    update(parts)
    state = live_bytes([parts]) - before

    experts = {name: parameter for name, parameter in named.items() if ".experts." in name}
    whole_experts: list[str] = []
    named["layers.0.attn_norm.weight"].register_post_accumulate_grad_hook(
        lambda parameter: whole_experts.extend(name for name, p in experts.items() if p.numel())
    )
    parts.schedule.step(batch, mtp_weight=0.3)
    gradients = live_bytes([parts]) - before - state
    return [state, gradients], whole_experts


def planned(parallel: ParallelConfig) -> list[int]:
    """Return what parallel/cost.py says: weights, optimizer state and buffers; gradients, kept by stage 3."""
    config = config_of(parallel)
    memory = rank_memory(
        config.model,
        parallel,
        DP2,
        compute=config.precision.compute,
        moment_bytes=2 if config.optimizer.moments is Moments.bf16 else 4,
        pp_rank=0,
        seq_len=PLAIN.seq_len,
    )
    state = memory.parameters + memory.optimizer + memory.buffers
    return [state + memory.gradients, 0] if parallel.zero_stage == 3 else [state, memory.gradients]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_process_holds_its_share_and_no_more(stage: int) -> None:
    expected = planned(STAGES[stage])
    for held, whole_experts in run_ranks(2, memory, STAGES[stage]):
        largest = 8192  # stage 2 keeps the whole gradient of a weight of which it owns a part
        # stage 3's bucket has a fixed size, beside which the rest of so small a model would not show
        bucket = 4 * DEEPSPEED_BUCKET_ELEMENTS if stage == 3 else 0
        assert held[0] - bucket == pytest.approx(expected[0] - bucket, rel=0.005)
        assert held[1] == pytest.approx(expected[1], rel=0.01, abs=largest)
        assert (whole_experts == []) == (stage == 3)


def outlived(rank: int, parallels: list[ParallelConfig]) -> list[int]:
    """Return how many parameters and flat tensors there still are after each engine is gone."""
    mesh, left = build_mesh(DP2, rank=rank), []
    for parallel in parallels:
        parts = build(mesh, config_of(parallel))
        passes(parts)
        update(parts)
        tensors = (*parts.model.named_parameters().values(), *parts.engine.masters().values())
        alive = [ref(tensor) for tensor in tensors]
        del parts, tensors
        gc.collect()
        left.append(sum(each() is not None for each in alive))
    return left


def test_a_job_of_several_stages_keeps_one_model() -> None:
    assert run_ranks(2, outlived, list(STAGES.values())) == [[0, 0, 0]] * 2
