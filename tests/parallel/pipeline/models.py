"""A small model cut into stages, a batch of unequal rows, and the gradients of one process."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.config import Gemm, ModelConfig, PrecisionConfig, Recompute
from model.fp8 import Fp8Policy, install_fp8
from model.init import initialize
from model.moe import MoE
from model.transformer import ModelOutput, Part, Transformer
from model.weight_gradients import WeightGradients, install
from parallel.apply import parallelize
from parallel.config import Dispatcher, ParallelConfig, Schedule
from parallel.expert import AllToAllDispatcher
from parallel.groups import Group
from parallel.mesh import Mesh, single_process
from parallel.pipeline.actions import action_table
from parallel.pipeline.executor import PipelineSchedule
from parallel.pipeline.rules import num_stages, stage_to_rank
from parallel.pipeline.table import ActionTable
from parallel.schedule import Batch, LocalSchedule, LocalSums, MicrobatchLoss, StepOutput
from parallel.sharding import Sharding, build_part
from parallel.tensor import TensorSplit, VocabularyRows
from tests.model.small import relative, small
from train.batch import IGNORED_LABEL, make_batch
from train.loss import Objective

SEQ_LEN, MTP_WEIGHT = 12, 0.3
SEED = 3


def config_of(num_layers: int, **changes: object) -> ModelConfig:
    return small(num_layers=num_layers, num_mtp_layers=1, balance_loss_weight=0.05, init_std=0.2, **changes)


def batch_of(sequences: int) -> Batch:
    """Every row has another number of valid targets, so averages of averages would be wrong."""
    rows_BW = torch.randint(64, (sequences, SEQ_LEN + 2), generator=torch.Generator().manual_seed(5))
    for row in range(sequences):
        rows_BW[row, SEQ_LEN - row % 8 :] = IGNORED_LABEL
    return make_batch(rows_BW, num_mtp_layers=1, device=torch.device("cpu"))


def chunk_of(
    config: ModelConfig, part: Part, recompute: Recompute = Recompute.none, mesh: Mesh | None = None
) -> Transformer:
    """Return a part of the model; of its experts, those that belong to this process."""
    sharding = Sharding(mesh=mesh or single_process())
    return build_part(config, part, sharding, device=torch.device("cpu"), seed=SEED, recompute=recompute)


def parts_of(config: ModelConfig, num_stages: int) -> list[Part]:
    """Cut the layers as evenly as they go."""
    borders = [stage * config.num_layers // num_stages for stage in range(num_stages + 1)]
    return [
        Part(first=stage == 0, layers=range(*borders[stage : stage + 2]), last=stage == num_stages - 1)
        for stage in range(num_stages)
    ]


def use_exchanges(model: nn.Module, ep: Group, config: ModelConfig, recompute: Recompute) -> None:
    """Give every mixture of experts a dispatcher that exchanges rows."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = AllToAllDispatcher(ep, config.moe.num_experts, recompute)


class RankSchedule:
    """The stages of one rank, and the schedule over them.

    fp8_dispatch: products inside the blocks are FP8, and what is exchanged for them is too, or not.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        schedule: Schedule,
        *,
        chunks: int = 2,
        microbatch_size: int = 1,
        recompute: Recompute = Recompute.none,
        overlap: bool = False,
        ep: Group | None = None,
        dispatcher: Dispatcher = Dispatcher.alltoall,
        fp8_dispatch: bool | None = None,
    ) -> None:
        sizes = {"pp": mesh.pp.size, "chunks": chunks}
        parts = parts_of(config, num_stages(schedule, **sizes))
        places = stage_to_rank(schedule, **sizes)
        mine = [stage for stage, rank in enumerate(places) if rank == mesh.pp.rank]
        self.chunks = {stage: chunk_of(config, parts[stage], recompute, mesh) for stage in mine}
        if len(mine) > 1 and {0, len(parts) - 1} <= set(mine):
            self.chunks[mine[-1]].embed = self.chunks[0].embed
        weights = WeightGradients()
        for chunk in self.chunks.values():
            install(chunk, weights)
            asked = ParallelConfig(recompute=recompute, dispatcher=dispatcher)
            parallelize(chunk, mesh, asked, fp8_dispatch=bool(fp8_dispatch))
            if fp8_dispatch is not None:
                install_fp8(chunk, Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference)), weights)
            if ep is not None:
                use_exchanges(chunk, ep, config, recompute)
        self.reduced: list[int] = []
        self.schedule = PipelineSchedule(
            self.chunks,
            functools.cache(functools.partial(self._table, schedule, chunks, overlap)),
            pp=mesh.pp,
            loss_function=self._loss,
            microbatch_size=microbatch_size,
            weight_gradients=weights,
            on_reduce=self.reduced.append,
            overlap=overlap,
            tokens_per_share=mesh.tp.size,
        )
        self._mesh = mesh

    def _table(self, schedule: Schedule, chunks: int, overlap: bool, count: int) -> ActionTable:
        sizes = {"pp": self._mesh.pp.size, "chunks": chunks, "num_microbatches": count}
        return action_table(schedule, **sizes, overlap=overlap)

    def _loss(self, output: ModelOutput, labels_BKS: Tensor, **scales: object) -> MicrobatchLoss:
        chunk, tp = self.chunks[max(self.chunks)], self._mesh.tp
        objective = Objective(
            chunk.head.weight,
            split=TensorSplit(tp, self._mesh.sequence),
            vocabulary=VocabularyRows(tp, chunk.config.vocab_size) if tp.size > 1 else None,
        )
        return objective(output, labels_BKS, **scales)  # type: ignore[arg-type]

    def step(self, batch: Batch, *, loss_scale: float = 1.0) -> LocalSums:
        return self.schedule.step(batch, mtp_weight=MTP_WEIGHT, loss_scale=loss_scale)


def one_process(config: ModelConfig, batch: Batch, microbatch_size: int) -> tuple[Transformer, StepOutput]:
    """Run the step on the whole model."""
    model = Transformer(config)
    initialize(model, seed=SEED)
    schedule = LocalSchedule(model, Objective(model.head.weight), microbatch_size=microbatch_size)
    return model, schedule.step(batch, mtp_weight=MTP_WEIGHT)


def gradients(models: Iterable[nn.Module], mesh: Mesh | None = None) -> dict[str, Tensor]:
    """Return every gradient by name, in the whole parameter's shape: zeros where others hold the rest.

    A parameter that two parts share counts once.
    """
    found: dict[str, Tensor] = {}
    sharding = Sharding(mesh=mesh or single_process())
    for name, parameter in dict(pair for model in models for pair in model.named_parameters()).items():
        assert parameter.grad is not None, name
        share = sharding.share(name)
        found[name] = torch.zeros(share.whole_shape(parameter.shape))
        share.of(found[name]).copy_(parameter.grad)
    return found


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Return |ours - theirs| / |theirs| of every gradient; all must be there, and none zero."""
    assert ours.keys() == theirs.keys()
    assert all(gradient.norm() > 1e-6 for gradient in theirs.values())
    return {name: relative(ours[name], theirs[name]) for name in theirs}
