"""Process groups with the collectives this project uses: the one file that calls torch.distributed's.

A `Group` knows its name, so that traces and errors can say which collective on which axis, and a group of one
process needs no torch.distributed: each collective is then the identity. Every operation is a SUM (or a MAX);
nothing here averages. Operations named `start_*` return a `Pending`, whose `wait` gives the result: on an
accelerator the present stream waits, on a CPU the host.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

Listener = Callable[["CollectiveCall"], None]


@dataclass
class CollectiveCall:
    """One collective of this process: what, on which group, bytes that leave this rank, when it ran."""

    operation: str
    group: str
    num_bytes: int
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None


class Trace:
    """What this process communicates: the calls under way, and whoever wants to hear of each one."""

    def __init__(self) -> None:
        self.under_way: list[CollectiveCall] = []
        self.listeners: list[Listener] = []

    def begin(self, operation: str, group: str, num_bytes: int) -> CollectiveCall:
        """Note that a collective starts."""
        call = CollectiveCall(operation, group, num_bytes)
        self.under_way.append(call)
        for listener in self.listeners:
            listener(call)
        return call

    def end(self, call: CollectiveCall) -> None:
        """Note that a collective is over."""
        call.ended = time.monotonic()
        self.under_way.remove(call)


class Pending:
    """A result under way; `wait` may be called once."""

    def __init__(self, result: Tensor, finish: Callable[[], object] | None = None) -> None:
        self._result = result
        self._finish = finish

    def wait(self) -> Tensor:
        """Return the result when it is complete."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._result


class Group:
    """The processes of one axis (or several axes) of the mesh that this process belongs to.

    name: of the axis, such as "tp"; ranks: global ranks in order; rank: this process's place among them.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int] = (0,),
        *,
        rank: int = 0,
        handle: dist.ProcessGroup | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.name, self.ranks, self.rank = name, tuple(ranks), rank
        self.handle = handle
        self.trace = trace or Trace()

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return len(self.ranks)

    def start_all_reduce(self, x: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """Reduce x in place over the group."""
        return self._start("all_reduce", x, x, lambda: dist.all_reduce(x, op, self.handle, async_op=True))

    def all_reduce(self, x: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce x in place over the group and return it."""
        return self.start_all_reduce(x, op=op).wait()

    def start_all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending:
        """Concatenate everybody's x (of one shape) along the first dimension, into `out` if given."""
        if self.size == 1:
            return Pending(x if out is None else out if _same_memory(x, out) else out.copy_(x))
        x = x.contiguous()
        result = x.new_empty(self.size * x.shape[0], *x.shape[1:]) if out is None else out
        return self._start(
            "all_gather",
            x,
            result,
            lambda: dist.all_gather_single(result, x, self.handle, async_op=True),
        )

    def all_gather(self, x: Tensor) -> Tensor:
        """Return everybody's x (of one shape), concatenated along the first dimension."""
        return self.start_all_gather(x).wait()

    def start_reduce_scatter(self, x: Tensor) -> Pending:
        """Sum x over the group and keep this rank's part of the first dimension, which `size` divides."""
        if self.size == 1:
            return Pending(x)
        x = x.contiguous()
        part = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return self._start(
            "reduce_scatter",
            x,
            part,
            lambda: dist.reduce_scatter_single(part, x, group=self.handle, async_op=True),
        )

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part, along the first dimension, of the sum of x over the group."""
        return self.start_reduce_scatter(x).wait()

    def start_all_to_all(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Pending:
        """Send rows of x to each process and receive theirs, along the first dimension, in rank order.

        sent[i] rows go to, received[i] rows come from process i of the group; None for equal parts.
        """
        if self.size == 1:
            return Pending(x)
        x = x.contiguous()
        rows = x.shape[0] if received is None else sum(received)
        result = x.new_empty(rows, *x.shape[1:])
        out_splits, in_splits = (None if s is None else list(s) for s in (received, sent))
        return self._start(
            "all_to_all",
            x,
            result,
            lambda: dist.all_to_all_single(result, x, out_splits, in_splits, self.handle, async_op=True),
        )

    def all_to_all(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        """Return the rows received; see `start_all_to_all`."""
        return self.start_all_to_all(x, received, sent).wait()

    def start_send(self, x: Tensor, to: int, *, tag: int = 0) -> Pending:
        """Send x to process `to` of the group."""
        return self._peer("send", dist.isend, x.contiguous(), to, tag)

    def start_receive(self, into: Tensor, source: int, *, tag: int = 0) -> Pending:
        """Receive into a contiguous tensor from process `source` of the group."""
        return self._peer("receive", dist.irecv, into, source, tag)

    def barrier(self) -> None:
        """Return when every process of the group has called this."""
        self.all_reduce(torch.zeros(1, device=self.device))

    @property
    def device(self) -> torch.device:
        """Return a device whose tensors this group's backend can communicate."""
        # the default backend of a job on accelerators is "cpu:gloo,cuda:nccl": the CPU is always among them
        return torch.device("cpu")

    def _peer(self, name: str, operation: Callable[..., object], x: Tensor, peer: int, tag: int) -> Pending:
        # batched even when alone: NCCL would otherwise open one more communicator for each pair
        def launch() -> dist.Work:
            return dist.batch_isend_irecv([dist.P2POp(operation, x, self.ranks[peer], self.handle, tag)])[0]

        return self._start(name, x, x, launch)

    def _start(self, name: str, x: Tensor, result: Tensor, launch: Callable[[], dist.Work | None]) -> Pending:
        if self.size == 1:
            return Pending(result)
        call = self.trace.begin(name, self.name, x.numel() * x.element_size())
        work = launch()

        def finish(sent: Tensor = x) -> None:  # what is being sent lives until it has arrived
            if work is not None:
                work.wait()
            self.trace.end(call)

        return Pending(result, finish)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors begin at one place; without addresses, which a dry run's tensors lack."""
    return x.untyped_storage() is y.untyped_storage() and x.storage_offset() == y.storage_offset()
