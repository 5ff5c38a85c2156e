"""The dry run itself: one process in the place of one rank takes a real step of the real trainer's parts.

`build_stage`, the schedule, the engine's `reduce` and `update` and the router's biases run as in
train/trainer.py, over tensors without memory (launch/dryrun/fake.py) and process groups that move nothing
(parallel/pretend.py). Left out is what a device does not see: data, checkpoints, logs, and the moving average
of the weights, which the host keeps.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from launch.dryrun.fake import DryMode, wide_tiles
from launch.dryrun.flops import FlopCount
from launch.dryrun.job import Collectives, RankReport, Request, pipeline_of
from launch.dryrun.launches import counted_launches
from launch.dryrun.memory import Kind, Memory, Moment
from launch.dryrun.modules import WorkingModule
from launch.dryrun.routing import EvenRouting
from model.config import Gemm
from model.dispatch import CountReader, counts_from
from parallel.groups import CollectiveCall, Trace
from parallel.mesh import Mesh, build_mesh
from parallel.pipeline.table import Action, ActionKind
from parallel.pretend import pretend
from parallel.schedule import Batch
from train.balance import update_router_biases
from train.batch import make_batch
from train.build import StageParts, build_stage
from train.engines.zero1 import Zero1Engine
from train.schedule import steps_value

CPU = torch.device("cpu")
STATE = (Kind.WEIGHTS, Kind.GRADIENTS, Kind.OPTIMIZER)
PER_MICROBATCH = frozenset({"pp", "tp", "cp", "ep", "ep_inter", "ep_intra", "sequence"})
"""Groups whose collectives every microbatch repeats; those of the others happen once a step."""


def run_rank(request: Request, rank: int, *, answers: CountReader | None = None) -> RankReport:
    """Run the step of one rank dry.

    Args:
        request: the job, without problems, and for how many microbatches it runs.
        rank: the rank that this process stands for.
        answers: what the host reads where it counts rows; balanced routing by default.

    Raises:
        ValueError: if the imbalance that is asked for cannot be.
    """
    with pretend(rank, request.world_size), wide_tiles():
        trace = Trace()
        mesh = build_mesh(request.layout, rank=rank, trace=trace)
        return _Run(request, mesh, trace).report(answers or even_routing(request, mesh))


def even_routing(request: Request, mesh: Mesh) -> EvenRouting:
    """Return the answers of balanced routing."""
    parallel, layout = request.parallel, request.layout
    share = request.stage_config.seq_len // (layout.cp * layout.tp)
    return EvenRouting(
        request.config.model,
        parallel,
        tokens=parallel.microbatch_size * share,
        places={group.name: group.rank for group in (mesh.ep, mesh.ep_inter, mesh.ep_intra)},
        imbalance=request.imbalance,
    )


class _Run:
    """One step and those who watch it."""

    def __init__(self, request: Request, mesh: Mesh, trace: Trace) -> None:
        self.request, self.mesh = request, mesh
        self.working = WorkingModule()
        self.memory, self.flops = Memory(self.working), FlopCount()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        trace.listeners.append(self._communicate)

    def report(self, answers: CountReader) -> RankReport:
        """Build, take the step, and say what was seen."""
        with ExitStack() as stack:
            turns = _MicrobatchTurns(self)
            stack.enter_context(DryMode([turns, self.memory, self.flops]))
            stack.enter_context(self.working.watching())
            stack.enter_context(counts_from(answers))
            if self.request.config.precision.gemm is Gemm.fp8_triton:
                stack.enter_context(counted_launches(self.flops.add))
            parts = self._build()
            batch = self._batch()
            self._passes(parts, batch, turns)
            flops = self.flops.total
            self._update(parts)
            layers, parameters = _describe(parts), _whole_parameters(parts)
        count = self.request.num_microbatches
        return RankReport(
            rank=self.mesh.rank,
            pp_rank=self.mesh.pp.rank,
            layers=layers,
            state=self.state,
            peak=self.memory.peak(),
            activations=self.memory.most_saved(),
            codes=self.codes,
            flops_per_microbatch=flops // count,
            num_microbatches=count,
            microbatches_of_step=self.request.microbatches_of_step,
            collectives=self._collectives(),
            parameters=parameters,
        )

    def _build(self) -> StageParts:
        config = self.request.config
        config = replace(config, optimizer=replace(config.optimizer, ema_decay=None))
        parts = build_stage(config, self.request.stage_config, device=CPU, mesh=self.mesh)
        self.working.add(parts.model.parts.values())
        name, parameters = self.memory.name, list(parts.model.named_parameters().values())
        name(Kind.WEIGHTS, parameters)
        name(Kind.WEIGHTS, (x for part in parts.model.parts.values() for x in part.buffers()))
        name(Kind.GRADIENTS, (p.grad for p in parameters if p.grad is not None))
        if isinstance(parts.engine, Zero1Engine):
            name(Kind.OPTIMIZER, parts.engine.masters().values())
            name(Kind.OPTIMIZER, parts.engine.optimizer.moment_tensors())
        return parts

    def _batch(self) -> Batch:
        """Return this rank's sequences; which tokens they have does not matter."""
        depths = self.request.config.model.num_mtp_layers
        rows = self.request.num_microbatches * self.request.parallel.microbatch_size
        width = self.request.stage_config.seq_len + 1 + depths
        rows_BW = torch.zeros(rows, width, dtype=torch.int64)
        return make_batch(rows_BW, num_mtp_layers=depths, device=CPU, mesh=self.mesh)

    def _passes(self, parts: StageParts, batch: Batch, turns: "_MicrobatchTurns") -> None:
        pipeline = pipeline_of(parts.schedule)
        if pipeline is not None:
            pipeline.listeners.append(self._act)
        self.state = {kind: self.memory.bytes_of(kind) for kind in STATE}
        self.memory.start_measuring()
        with turns.counted() if pipeline is None else ExitStack():
            self.output = parts.schedule.step(
                batch, mtp_weight=steps_value(self.request.stage_config.mtp_weight, 0)
            )
        self.memory.end_passes()
        self.codes = self.memory.bytes_of(Kind.WEIGHTS) - self.state[Kind.WEIGHTS]

    def _update(self, parts: StageParts) -> None:
        self.memory.enter(Moment("optimizer step"))
        parts.engine.reduce()
        parts.engine.update(
            lr=self.request.stage_config.lr.peak,
            max_norm=self.request.config.optimizer.max_grad_norm,
            loss_scale=1.0,
            finite=True,
        )
        routers = parts.model.routers()
        update_router_biases(routers, self.output.loads_of(routers), speed=0.001)

    def _act(self, action: Action) -> None:
        forward = action.kind in (ActionKind.FORWARD, ActionKind.OVERLAP)
        saves = action.kind is ActionKind.BACKWARD_INPUT
        self.memory.enter(Moment(str(action), forward=forward, saves=saves))

    def _communicate(self, call: CollectiveCall) -> None:
        self.calls[call.operation, call.group] += 1
        self.num_bytes[call.operation, call.group] += call.num_bytes

    def _collectives(self) -> tuple[Collectives, ...]:
        """Return what was counted, scaled to the microbatches of the whole step."""
        found = []
        for (operation, group), calls in self.calls.items():
            repeated = group in PER_MICROBATCH
            ran, step = self.request.num_microbatches, self.request.microbatches_of_step
            of, in_all = (ran, step) if repeated else (1, 1)
            num_bytes = self.num_bytes[operation, group]
            found.append(
                Collectives(
                    operation=operation,
                    group=group,
                    calls=calls * in_all // of,
                    num_bytes=num_bytes * in_all // of,
                    per_microbatch=repeated,
                )
            )
        return tuple(found)


class _MicrobatchTurns:
    """Tells the memory, without a pipeline's table, when passes begin: when autograd starts or stops."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._counts = False
        self._backwards = False
        self._microbatch = 0

    def counted(self) -> ExitStack:
        """Return the context in which passes are told apart."""
        stack = ExitStack()
        self._counts = True
        stack.callback(setattr, self, "_counts", False)
        self._enter()
        return stack

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Observe an operation."""
        if not self._counts or self._run.working.differentiates is self._backwards:
            return
        self._backwards = not self._backwards
        self._microbatch += not self._backwards
        self._enter()

    def _enter(self) -> None:
        over = self._microbatch == self._run.request.num_microbatches
        way = "totals" if over else "backward" if self._backwards else "forward"
        name = way if over else f"{way} of microbatch {self._microbatch}"
        self._run.memory.enter(Moment(name, forward=way == "forward"))


def _describe(parts: StageParts) -> tuple[str, ...]:
    """Return what each stage of this rank holds."""
    found = []
    for _, part in sorted(parts.model.parts.items()):
        layers = part.part.layers
        named = [
            "embed" * part.part.first,
            f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}" * len(layers),
            "head" * part.part.last,
            "MTP" * (part.part.last and bool(part.mtp)),
        ]
        found.append(" ".join(filter(None, named)))
    return tuple(found)


def _whole_parameters(parts: StageParts) -> dict[str, int]:
    share = parts.model.sharding.share
    return {name: p.numel() * share(name).count for name, p in parts.model.named_parameters().items()}
