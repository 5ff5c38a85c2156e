"""What a layout costs: memory of every rank, traffic, time, and figures made of them. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from model.config import ModelConfig, PrecisionConfig
from model.cost import flops_per_token
from parallel.checks import layout_of
from parallel.cluster import ClusterConfig
from parallel.config import ParallelConfig
from parallel.cost import RankMemory, rank_memory
from parallel.kept import Kept, rank_activations, rank_recomputed
from parallel.layout import Layout
from parallel.placement import assign_layers, count_stages
from parallel.rates import GIGA, TERA, rates_of
from parallel.stage_costs import Blocks, Stages
from parallel.steptime import StepTime, step_time
from parallel.work import Setting

HOUR = 3600

T = TypeVar("T")
Key = tuple[object, ...]


def once(known: dict[Key, T], key: Key, compute: Callable[[], T]) -> T:
    """Return what is known under a key, computed at the first time."""
    if key not in known:
        known[key] = compute()
    return known[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What layouts of one task have in common, computed once: a search looks at thousands of them."""

    blocks: dict[Key, Blocks] = field(default_factory=dict)
    kept: dict[Key, Kept] = field(default_factory=dict)
    layers: dict[Key, list[range]] = field(default_factory=dict)
    state: dict[Key, list[RankMemory]] = field(default_factory=dict)
    one_microbatch: dict[Key, tuple[float, float, float]] = field(default_factory=dict)
    """See parallel/floors.py."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, and on what: everything but the layout.

    batch_sizes: every number of sequences that a step may have; figures are for the largest. moment_bytes: of
    an element of each of AdamW's moments. imbalance: rows of the busiest device over the mean.
    """

    model: ModelConfig
    precision: PrecisionConfig
    cluster: ClusterConfig
    world_size: int
    seq_len: int
    batch_sizes: tuple[int, ...]
    moment_bytes: int
    imbalance: float = 1.0
    shared: Shared = field(default_factory=Shared, repr=False, compare=False)

    def with_batches(self, *sizes: int) -> "Task":
        """Return the same task with steps of these numbers of sequences."""
        return replace(self, batch_sizes=sizes, shared=Shared())

    def on(self, cluster: ClusterConfig) -> "Task":
        """Return the same task on another cluster."""
        return replace(self, cluster=cluster, shared=Shared())

    @property
    def memory_limit(self) -> float:
        """Return the bytes of a device that a plan may use."""
        usable = self.cluster.usable_gb
        return float("inf") if usable is None else GIGA * usable


@dataclass(frozen=True, kw_only=True, slots=True)
class RankUse:
    """Bytes of one pipeline rank's devices."""

    state: RankMemory
    activations: float
    """Of all microbatches that are held at once, factors of weight gradients that are put off among them."""
    recomputed: float
    """What recomputing one block brings back."""

    @property
    def total(self) -> float:
        """Return the bytes on the device."""
        return self.state.total + self.activations + self.recomputed


@dataclass(frozen=True)
class Plan:
    """One layout of a task. Raises ValueError where the layout is illegal; `parallel.checks` says why."""

    task: Task
    parallel: ParallelConfig

    @cached_property
    def layout(self) -> Layout:
        """Return its degrees."""
        return layout_of(self.parallel, self.task.world_size)

    @cached_property
    def stages(self) -> Stages:
        """Return what its stages cost."""
        task = self.task
        setting = Setting(
            model=task.model,
            parallel=self.parallel,
            precision=task.precision,
            seq_len=task.seq_len,
            rates=rates_of(task.cluster, task.precision),
            imbalance=task.imbalance,
        )
        blocks = once(task.shared.blocks, self.alike, lambda: Blocks.of(setting, task.cluster))
        return Stages(setting, task.cluster, self.layout, blocks=blocks, layers=self.layers)

    @property
    def alike(self) -> Key:
        """Return what decides the costs of a layer: layouts that agree in it share them."""
        p = self.parallel
        hops = (p.dispatcher, p.node_size)
        return p.tp, p.cp, p.ep, *hops, p.context, p.recompute, p.microbatch_size

    @cached_property
    def layers(self) -> list[range]:
        """Return the layers of every stage."""
        task, stages = self.task, count_stages(self.parallel)
        if by_hand := self.parallel.layers_per_stage:
            return assign_layers(task.model, task.seq_len, stages, layers_per_stage=by_hand)
        return once(task.shared.layers, (stages,), lambda: assign_layers(task.model, task.seq_len, stages))

    @cached_property
    def memory(self) -> list[RankUse]:
        """Return what each pipeline rank's devices hold at the most."""
        stages = self.stages
        kept = once(self.task.shared.kept, self.alike, lambda: Kept.of(stages.setting))
        count = self.num_microbatches(max(self.task.batch_sizes))
        each = zip(
            self.state,
            rank_activations(stages, kept, num_microbatches=count),
            rank_recomputed(stages, kept),
            strict=True,
        )
        return [
            RankUse(state=state, activations=activations, recomputed=recomputed)
            for state, activations, recomputed in each
        ]

    @cached_property
    def state(self) -> list[RankMemory]:
        """Return weights and codes, gradients and optimizer state of each pipeline rank's devices."""
        p = self.parallel
        places = [self.stages.on_rank(rank) for rank in range(self.layout.pp)]
        alike = (p.tp, p.ep, p.dp_replicate, p.engine, p.zero_stage, p.offload)
        return once(
            self.task.shared.state, (*alike, tuple(map(tuple, places)), tuple(self.layers)), self._state
        )

    def _state(self) -> list[RankMemory]:
        task = self.task
        placed = replace(self.parallel, layers_per_stage=[len(layers) for layers in self.layers])
        return [
            rank_memory(
                task.model,
                placed,
                self.layout,
                compute=task.precision.compute,
                moment_bytes=task.moment_bytes,
                pp_rank=pp_rank,
                seq_len=task.seq_len,
                gemm=task.precision.gemm,
            )
            for pp_rank in range(self.layout.pp)
        ]

    @property
    def peak_memory(self) -> float:
        """Return the bytes of the fullest device."""
        return max(rank.total for rank in self.memory)

    @property
    def fits(self) -> bool:
        """Return whether the fullest device has room."""
        limit = self.task.memory_limit
        return max(held.total for held in self.state) <= limit and self.peak_memory <= limit

    def num_microbatches(self, batch_size: int) -> int:
        """Return the microbatches of a data-parallel rank in a step of so many sequences."""
        return -(-batch_size // (self.layout.dp * self.parallel.microbatch_size))

    def step(self, batch_size: int, *, rough: bool = False) -> StepTime:
        """Return the time of a step of so many sequences; see `step_time`."""
        return step_time(
            self.stages,
            num_microbatches=self.num_microbatches(batch_size),
            memory=self.state,
            moment_bytes=self.task.moment_bytes,
            rough=rough,
        )

    @cached_property
    def full_step(self) -> StepTime:
        """Return the time of a step of the largest batch."""
        return self.step(max(self.task.batch_sizes))

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens that one device of the cluster trains on in a second."""
        tokens = max(self.task.batch_sizes) * self.task.seq_len
        return tokens / self.full_step.seconds / self.task.world_size

    @property
    def mfu(self) -> float | None:
        """Return the model's FLOP/s over the BF16 peak, whatever the precision; None without a peak."""
        peak = self.task.cluster.peak_tflops
        useful = self.tokens_per_second * flops_per_token(self.task.model, self.task.seq_len)
        return None if peak is None else useful / (peak * TERA)

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """Return the device hours that 10^12 tokens take."""
        return TERA / self.tokens_per_second / HOUR
