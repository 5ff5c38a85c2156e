"""The typed root of a run's configuration: what `configs/` composes into, and what every tool reads back.

Sections are inert: data, and `problems()`. A stage owns everything that changes between the stages of
one job (arXiv 2412.19437, sections 4.2 and 4.3); the rest of `RunConfig` is shared by all stages.
Every schedule is a function of the tokens (or steps) seen since its stage began.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from enum import StrEnum

from data.config import DataConfig
from model.config import ModelConfig, PrecisionConfig, YarnConfig
from parallel.cluster import ClusterConfig
from parallel.config import ParallelConfig


class Curve(StrEnum):
    """Shape of one piece of the learning-rate schedule."""

    constant = "constant"  # jump to `to` and stay there
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class LrPiece:
    """One piece of the schedule after warm-up; it starts where the piece before it ended."""

    curve: Curve = Curve.constant
    to: float | None = None  # rate at the end of the piece; null keeps the rate it starts with
    until_tokens: int | None = None  # null, with until_fraction null: the end of the stage
    until_fraction: float | None = None  # the same, as a fraction of the stage's num_tokens


@dataclass(kw_only=True, slots=True)
class LrConfig:
    """Warm-up over steps, then pieces over tokens."""

    peak: float = 2.2e-4
    warmup_steps: int = 0
    pieces: list[LrPiece] = field(default_factory=lambda: [LrPiece()])

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.peak <= 0:
            found.append(f"peak={self.peak} must be positive; use 2.2e-4")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps={self.warmup_steps} must not be negative; use 0")
        for i, piece in enumerate(self.pieces):
            if piece.until_tokens is not None and piece.until_fraction is not None:
                found.append(f"pieces[{i}] sets both until_tokens and until_fraction; use one of them")
            if piece.until_fraction is not None and not 0 < piece.until_fraction <= 1:
                found.append(f"pieces[{i}].until_fraction={piece.until_fraction} must lie in (0, 1]; use 1")
            if piece.to is not None and piece.to < 0:
                found.append(f"pieces[{i}].to={piece.to} must not be negative; use 0")
        return found


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """Sequences per optimizer step, raised linearly from `start` to `end` over the first `ramp_tokens`."""

    start: int = 3072
    end: int = 15360
    ramp_tokens: int = 0
    multiple_of: int = 1  # sizes on the ramp are rounded down to a multiple of this

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.start < 1 or self.end < 1 or self.multiple_of < 1:
            found.append(
                f"start={self.start}, end={self.end}, multiple_of={self.multiple_of} must all be positive"
            )
        elif self.start % self.multiple_of or self.end % self.multiple_of:
            found.append(
                f"multiple_of={self.multiple_of} must divide start={self.start} and end={self.end}; use 1"
            )
        if self.ramp_tokens < 0:
            found.append(f"ramp_tokens={self.ramp_tokens} must not be negative; use 0 for no ramp")
        if self.ramp_tokens == 0 and self.start != self.end:
            found.append(f"ramp_tokens=0 needs start={self.start} equal to end={self.end}; set ramp_tokens")
        return found


@dataclass(kw_only=True, slots=True)
class StepsConfig:
    """A value that changes by jumps: values[i] holds until boundaries[i] tokens, the last one to the end."""

    values: list[float] = field(default_factory=lambda: [0.0])
    boundaries: list[int] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if len(self.values) != len(self.boundaries) + 1:
            found.append(
                f"values has {len(self.values)} entries for {len(self.boundaries)} boundaries; "
                "give one value more than boundaries"
            )
        if sorted(set(self.boundaries)) != list(self.boundaries):
            found.append(f"boundaries={list(self.boundaries)} must increase")
        return found


class CarryOver(StrEnum):
    """What a stage does with the optimizer state of the stage before it."""

    keep = "keep"
    reset = "reset"


def _filled_from_run(layout: type[ParallelConfig]) -> type[ParallelConfig]:
    """Return the class with every default replaced by an interpolation of the run's own value."""
    filled = [(each.name, each.type, field(default=f"${{parallel.{each.name}}}")) for each in fields(layout)]
    names = {"__doc__": layout.__doc__, "__module__": layout.__module__}
    return make_dataclass(layout.__name__, filled, bases=(layout,), namespace=names, kw_only=True, slots=True)


@_filled_from_run
class StageParallelConfig(ParallelConfig):
    """The layout of one stage, with the keys of ParallelConfig; those left out are the run's own."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of training: `seq_len` and everything that may change with it."""

    seq_len: int = 4096
    num_tokens: int = 0
    batch: BatchConfig = field(default_factory=BatchConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    mtp_weight: StepsConfig = field(
        default_factory=lambda: StepsConfig(values=[0.3])
    )  # lambda of equation 25
    bias_speed: StepsConfig = field(
        default_factory=lambda: StepsConfig(values=[0.001])
    )  # gamma, section 2.1.2
    yarn: YarnConfig | None = None
    source_weights: dict[str, float] = field(
        default_factory=dict
    )  # replaces the weights of data.sources by name
    optimizer_state: CarryOver = CarryOver.keep
    parallel: StageParallelConfig | None = None  # what differs from the run's own layout

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.seq_len < 2:
            found.append(f"seq_len={self.seq_len} must be at least 2")
        if self.num_tokens < 1:
            found.append(f"num_tokens={self.num_tokens} must be positive")
        return found


class Moments(StrEnum):
    """The type in which AdamW keeps its two moments; its arithmetic is FP32 either way."""

    bf16 = "bf16"
    fp32 = "fp32"


class AdamKernel(StrEnum):
    """What computes an update: the same formula, the same state, so that a run may change it anywhere."""

    torch = "torch"  # anywhere; BF16 moments are widened, updated and rounded in chunks
    transformer_engine = "transformer_engine"  # a GPU; the kernel of its FusedAdam, which takes BF16 moments


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) on FP32 master weights."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only: not on norms, not on biases
    max_grad_norm: float = 1.0
    moments: Moments = Moments.bf16
    kernel: AdamKernel = AdamKernel.torch
    lr_multipliers: dict[str, float] = field(
        default_factory=dict
    )  # glob over parameter names -> factor, first match
    max_skipped_steps: int = 10  # non-finite steps in a row that stop the run
    ema_decay: float | None = None  # null: no moving average; else one is kept in CPU memory

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.eps <= 0:
            found.append(f"eps={self.eps} must be positive; use 1e-8")
        if self.weight_decay < 0:
            found.append(f"weight_decay={self.weight_decay} must not be negative; use 0")
        if self.max_grad_norm <= 0:
            found.append(
                f"max_grad_norm={self.max_grad_norm} must be positive; use 1.0, or .inf for no clipping"
            )
        if self.max_skipped_steps < 1:
            found.append(f"max_skipped_steps={self.max_skipped_steps} must be at least 1; use 10")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(f"ema_decay={self.ema_decay} must lie in (0, 1); use null for no moving average")
        for pattern, factor in self.lr_multipliers.items():
            if factor < 0:
                found.append(f"lr_multipliers.{pattern}={factor} must not be negative; use 0 to freeze")
        return found


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. A stage end is always written and always kept."""

    every_steps: int = 1000
    keep_last: int = 3
    asynchronous: bool = True

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.every_steps < 1:
            found.append(f"every_steps={self.every_steps} must be at least 1; use 1000")
        if self.keep_last < 1:
            found.append(f"keep_last={self.keep_last} must be at least 1; use 3")
        return found


class WandbMode(StrEnum):
    """Where Weights & Biases writes."""

    auto = "auto"  # online when logged in, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """metrics.jsonl is always written, one line a step; this says what else."""

    console_every: int = 10
    histogram_every: int = 100  # steps between expert-load histograms
    fp8_every: int = 100  # steps between counts of what FP8 loses; without effect unless gemm is FP8
    wandb: WandbMode = WandbMode.auto
    wandb_project: str = "fathom"
    wandb_entity: str | None = None

    def problems(self) -> list[str]:
        """Return every broken rule."""
        return [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("console_every", "histogram_every", "fp8_every")
            if getattr(self, name) < 1
        ]


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured before and after each stage, and by `python -m train.evaluate`."""

    num_tokens: int = 131072  # held-out tokens per sequence length
    needle_depths: int = 5
    needle_lengths: int = 3  # halvings of the stage's length that are tried
    needle_trials: int = 4
    enabled: bool = True

    def problems(self) -> list[str]:
        """Return every broken rule."""
        return [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("num_tokens", "needle_depths", "needle_lengths", "needle_trials")
            if getattr(self, name) < 1
        ]


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run is. Composed by Hydra from `configs/`, stored beside its checkpoints."""

    recipe: str = "custom"
    name: str = "${recipe}"  # the folder under `root`
    root: str = "runs"
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    init_from: str | None = (
        None  # a run or checkpoint whose weights (not optimizer state) the first stage starts from
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
