"""This process's parts of the model: one, or one per pipeline stage that it runs."""

from dataclasses import dataclass

import torch
from torch import nn

from model.config import Compute, ModelConfig, YarnConfig
from model.router import Router
from model.transformer import Part, Transformer
from parallel.apply import parallelize
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.placement import assign_layers, count_stages, rank_of_stage, stages_on_rank
from parallel.sharding import Sharding, build_part


@dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """The parts of the model by pipeline stage, and how their parameters are split."""

    mesh: Mesh
    sharding: Sharding
    parts: dict[int, Transformer]
    num_stages: int

    @property
    def last(self) -> Transformer | None:
        """Return the part with norm, MTP and head, where this process has it."""
        return self.parts.get(self.num_stages - 1)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by global name, each once."""
        return {
            name: parameter for part in self.parts.values() for name, parameter in part.named_parameters()
        }

    def routers(self) -> dict[str, Router]:
        """Return the routers held here by the name of their block, in the order of the model's layers."""
        return {
            name: router
            for stage in sorted(self.parts)
            for name, router in self.parts[stage].routers().items()
        }

    def completing_stages(self) -> dict[str, int | None]:
        """Return by parameter the stage whose last backward pass completes its gradient.

        None where the end of the step does: both ends of the pipeline have a share in the embedding's.
        """
        completed: dict[str, int | None] = {}
        for stage, part in self.parts.items():
            for name, _ in part.named_parameters():
                shared = name in completed or self.sharding.reduction(name) is self.mesh.ends
                completed[name] = None if shared or self.num_stages == 1 else stage
        return completed


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    *,
    device: torch.device,
    seed: int,
    seq_len: int,
    yarn: YarnConfig | None = None,
    compute: Compute = Compute.fp32,
    fp8_dispatch: bool = False,
) -> ParallelModel:
    """Build and initialise this process's parts, with everything parallel installed at their seams."""
    num_stages = count_stages(parallel)
    layers = assign_layers(config, seq_len, num_stages, layers_per_stage=parallel.layers_per_stage)
    placed = (parallel.schedule, parallel.pp, parallel.chunks)
    first_rank, last_rank = rank_of_stage(*placed, 0), rank_of_stage(*placed, num_stages - 1)
    two_embeddings = config.num_mtp_layers > 0 and first_rank != last_rank
    sharding = Sharding(mesh=mesh, two_embeddings=two_embeddings)
    parts: dict[int, Transformer] = {}
    for stage in stages_on_rank(*placed, mesh.pp.rank):
        part = Part(first=stage == 0, layers=layers[stage], last=stage == num_stages - 1)
        parts[stage] = build_part(
            config,
            part,
            sharding,
            device=device,
            seed=seed,
            yarn=yarn,
            recompute=parallel.recompute,
            compute=compute,
        )
        parallelize(parts[stage], mesh, parallel, fp8_dispatch=fp8_dispatch)
    if len(parts) > 1 and {0, num_stages - 1} <= parts.keys() and config.num_mtp_layers:
        parts[num_stages - 1].embed = parts[0].embed  # one table, looked up by both ends
    return ParallelModel(mesh=mesh, sharding=sharding, parts=parts, num_stages=num_stages)
