"""What others published of training DeepSeek-V3, and what this planner predicts for the same layouts.

Nothing in the model of time was fitted to these figures; they are what it is judged by. Where a publication
does not say something, the note does what was assumed.
"""

from dataclasses import dataclass

from launch.plan.question import questions
from parallel.planner import HOUR, Plan
from parallel.rates import TERA
from train.config import RunConfig
from train.config_store import compose_run


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """Device hours that a stage of the published run took, and their price."""

    gpu_hours: float
    dollars: float


REPORT = "arXiv 2412.19437, table 1"
STAGE_COSTS = {
    ("pretrain_4k",): StageCost(gpu_hours=2_664_000, dollars=5.328e6),
    ("extend_32k", "extend_128k"): StageCost(gpu_hours=119_000, dollars=0.238e6),
}
"""Of DeepSeek-V3 on 2048 H800 at 2 dollars an hour, by REPORT; some stages are given together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One published speed: tokens that one device trains on in a second, at 4096 tokens."""

    name: str
    tokens_per_second: float
    batch: int
    overrides: tuple[str, ...]
    """Of `recipe=deepseek_v3`."""
    source: str
    note: str


_FP8 = "precision=fp8_reference"
_MEGATRON = "precision.fp8_dispatch=false"
POINTS = (
    Point(
        name="DeepSeek-V3, 2048 H800",
        tokens_per_second=TERA / (180e3 * HOUR),
        batch=15360,
        overrides=("cluster=h800_2048", "parallel=deepseek_v3", _FP8),
        source="arXiv 2412.19437, section 1: 180K hours per trillion tokens",
        note="DualPipe taken as DualPipeV; the figure includes the ramp of the batch and interruptions",
    ),
    Point(
        name="Megatron, 1024 H100",
        tokens_per_second=1297,
        batch=8192,
        overrides=(
            "cluster=h100_1024",
            "parallel=deepseek_v3",
            _FP8,
            _MEGATRON,
            "parallel.tp=2",
            "parallel.pp=8",
            "parallel.ep=64",
            "parallel.schedule=interleaved",
            "parallel.chunks=4",
            "parallel.layers_per_stage=[1" + ",2" * 30 + ",0]",
        ),
        source="Megatron-Bridge performance summary, 25.09",
        note="balanced routing by force; recomputes MLA's up-projections and dense networks",
    ),
    Point(
        name="Megatron, 256 B200",
        tokens_per_second=3328,
        batch=4096,
        overrides=(
            "cluster=b200_256",
            "parallel=deepseek_v3",
            _FP8,
            _MEGATRON,
            "parallel.pp=8",
            "parallel.ep=32",
            "parallel.schedule=interleaved",
            "parallel.chunks=2",
            "parallel.layers_per_stage=[" + "4," * 15 + "1]",
        ),
        source="Megatron-Bridge performance summary, 26.04.01",
        note="MXFP8; theirs hides exchanges in the interleaved schedule, which is predicted without",
    ),
    Point(
        name="Megatron, 256 GB200",
        tokens_per_second=4969,
        batch=4096,
        overrides=(
            "cluster=gb200_256",
            "parallel=deepseek_v3",
            _FP8,
            _MEGATRON,
            "parallel.pp=4",
            "parallel.ep=64",
            "parallel.dispatcher=alltoall",
            "parallel.schedule=interleaved",
            "parallel.chunks=4",
            "parallel.layers_per_stage=[" + "4," * 15 + "1]",
        ),
        source="Megatron-Bridge performance summary, 26.06",
        note="MXFP8; theirs hides exchanges in the interleaved schedule, which is predicted without",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A published speed and the predicted one, in tokens a second and device."""

    point: Point
    plan: Plan

    @property
    def predicted(self) -> float:
        """Return the predicted tokens per second and device."""
        return self.plan.tokens_per_second

    @property
    def error(self) -> float:
        """Return by how much the predicted speed exceeds the published one, relative to it."""
        return self.predicted / self.point.tokens_per_second - 1


def compare(point: Point) -> Comparison:
    """Predict a published point from its layout."""
    config: RunConfig = compose_run(["recipe=deepseek_v3", *point.overrides])
    (asked, *_) = questions(config, overrides=(), world_size=None)
    return Comparison(point=point, plan=Plan(asked.task.with_batches(point.batch), config.parallel))
