"""What is run dry, and what is said about it."""

from dataclasses import dataclass

from launch.dryrun.memory import Kind, Peak
from parallel.checks import layout_of
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.pipeline.executor import PipelineSchedule
from parallel.schedule import Schedule, WorldSchedule
from train.config import RunConfig, StageConfig
from train.precision import Fp8Schedule


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be run.

    num_microbatches: that really run, of `microbatches_of_step`; imbalance: see launch/dryrun/routing.py.
    """

    config: RunConfig
    stage: str
    world_size: int
    num_microbatches: int
    microbatches_of_step: int
    imbalance: float = 1.0

    @property
    def stage_config(self) -> StageConfig:
        """Return the stage."""
        return self.config.stages[self.stage]

    @property
    def parallel(self) -> ParallelConfig:
        """Return the layout of the stage as configured."""
        return self.stage_config.parallel or self.config.parallel

    @property
    def layout(self) -> Layout:
        """Return the layout's degrees."""
        return layout_of(self.parallel, self.world_size)


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """All collectives of one operation on one group in a step."""

    operation: str
    group: str
    calls: int
    num_bytes: int
    per_microbatch: bool


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What a step asks of one rank. Bytes and FLOPs; the collectives are those of the whole step."""

    rank: int
    pp_rank: int
    layers: tuple[str, ...]
    """The layers of each of its stages, such as "embed 0-1"."""
    state: dict[Kind, int]
    """What it keeps between steps: weights, gradients, optimizer state."""
    peak: Peak
    activations: int
    """The most that waited for backward passes when a forward pass ended."""
    codes: int
    """What the passes made of weights, such as FP8 codes, and kept to their end."""
    flops_per_microbatch: int
    num_microbatches: int
    microbatches_of_step: int
    collectives: tuple[Collectives, ...]
    parameters: dict[str, int]
    """Elements of the whole parameters of which this rank has a share, by name."""

    @property
    def flops_per_step(self) -> int:
        """Return the FLOPs of a whole step."""
        return self.flops_per_microbatch * self.microbatches_of_step


def pipeline_of(schedule: Schedule) -> PipelineSchedule | None:
    """Return what runs a pipeline's table, None where there is none."""
    match schedule:
        case Fp8Schedule():
            return pipeline_of(schedule.schedule)
        case WorldSchedule(passes=PipelineSchedule() as passes):
            return passes
        case _:
            return None
