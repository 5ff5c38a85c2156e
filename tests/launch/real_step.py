"""One real optimizer step on a process of a gloo job, and what it really took: the truth of a dry run."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from launch.dryrun.job import Request, pipeline_of
from model.dispatch import counts_from
from parallel.groups import CollectiveCall, Pending, Trace
from parallel.mesh import build_mesh
from parallel.pipeline.table import Action, ActionKind
from parallel.schedule import LocalSchedule
from tests.distributed import GLOO_S
from train.balance import update_router_biases
from train.batch import make_batch
from train.build import StageParts, build_stage
from train.engines.zero1 import Zero1Engine

CPU = torch.device("cpu")
MARK_BYTES = 1_000_003
"""Of a tensor that is made and dropped to mark a moment among the events of the profiler."""


@dataclass
class Measured:
    """What one process saw. Bytes; collectives by (operation, group): calls and bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    saved: int = 0
    """The most that was allocated and not freed when a forward pass had ended."""
    peak: int = 0
    """The most at any time."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: list[list[int]] = field(default_factory=list)
    """What the host read of the routing, in order."""


def measure(rank: int, requests: list[Request]) -> list[Measured]:
    """Take the step of each request as one of its processes."""
    Pending.wait = _patiently  # type: ignore[method-assign]
    return [_measure(rank, request) for request in requests]


def _patiently(self: Pending) -> Tensor:
    """Wait as `Pending.wait` does, but let go after gloo's threads, which the profiler does not see."""
    finish, self._finish = self._finish, None
    if finish is not None:
        finish()
        time.sleep(GLOO_S)
    return self._result


def _measure(rank: int, request: Request) -> Measured:
    found, trace = Measured(), Trace()

    def hear(call: CollectiveCall) -> None:
        found.calls[call.operation, call.group] += 1
        found.num_bytes[call.operation, call.group] += call.num_bytes

    def read(counts: Tensor) -> list[int]:
        found.counts.append(counts.tolist())
        return found.counts[-1]

    trace.listeners.append(hear)
    mesh = build_mesh(request.layout, rank=rank, trace=trace)
    parts = build_stage(request.config, request.stage_config, device=CPU, mesh=mesh)
    _measure_state(parts, found)
    depths = request.config.model.num_mtp_layers
    rows = request.num_microbatches * request.parallel.microbatch_size
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    shape = (rows, request.stage_config.seq_len + 1 + depths)
    rows_BW = torch.randint(request.config.model.vocab_size, shape, generator=generator)
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with counts_from(read), marks(parts), profiled:
        batch = make_batch(rows_BW, num_mtp_layers=depths, device=CPU, mesh=mesh)
        output = parts.schedule.step(batch, mtp_weight=0.3)
    found.saved, found.peak = _most(profiled)
    parts.engine.reduce()
    parts.engine.update(lr=1e-3, max_norm=1.0, loss_scale=1.0, finite=True)
    routers = parts.model.routers()
    update_router_biases(routers, output.loads_of(routers), speed=0.001)
    return found


def _measure_state(parts: StageParts, found: Measured) -> None:
    assert isinstance(parts.engine, Zero1Engine)
    parameters = list(parts.model.named_parameters().values())
    buffers = [x for part in parts.model.parts.values() for x in part.buffers()]
    weights = storage_bytes(parameters)
    found.weights = weights + storage_bytes(buffers)
    found.gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)
    masters = storage_bytes([*parameters, *parts.engine.masters().values()]) - weights
    found.optimizer = masters + storage_bytes(parts.engine.optimizer.moment_tensors())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory behind tensors, each piece of memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def marks(parts: StageParts) -> Iterator[None]:
    """Mark the end of every forward pass."""

    def mark() -> None:
        torch.empty(MARK_BYTES, dtype=torch.uint8)

    schedule: Any = parts.schedule
    pipeline = pipeline_of(schedule)
    saved = False

    def act(action: Action) -> None:
        nonlocal saved
        if saved:
            mark()
        saved = action.kind in (ActionKind.FORWARD, ActionKind.OVERLAP)

    if pipeline is not None:
        pipeline.listeners.append(act)
        yield
        return
    local: Any = schedule if isinstance(schedule, LocalSchedule) else schedule.schedule
    objective = local._loss_function

    def marked(*args: Any, **kwargs: Any) -> Any:
        loss = objective(*args, **kwargs)
        mark()
        return loss

    local._loss_function = marked
    yield


def _most(profiled: profile) -> tuple[int, int]:
    """Return the most bytes in use at marks, and at any time, from the profiler's events."""
    events: Any = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    in_use = list(accumulate(0 if abs(change) == MARK_BYTES else change for change in changes))
    at_marks = [total for total, change in zip(in_use, changes, strict=True) if change == MARK_BYTES]
    return max(at_marks), max(in_use)
