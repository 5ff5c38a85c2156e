"""ZeRO stage 1 (arXiv 1910.02054) on flat buffers: the storage behind a model's parameters.

Parameters that share a storage type, an update rule and the processes over which their gradients are summed
live in one `Bucket` (parallel/bucket.py). One optimizer step is always the same sequence, bucket by bucket:

    reduce     one reduce-scatter sums the FP32 gradients; each process keeps the range it owns
    norm       once over all buckets and all processes
    update     the optimizer changes the FP32 masters of the range owned here
    publish    masters are rounded to the compute type, and one all-gather fetches everybody's

A parameter that several ranks hold whole (norms under tensor parallelism, the embedding at both ends of a
pipeline) is simply summed and sharded over more processes, so that nothing is counted twice and no copy
drifts. A bucket is reduced as soon as its pipeline stage is done (`start_reduce`, driven by the schedule and
not by hooks, which do not fire where a schedule splits the backward pass). On one process a range is the
whole bucket and every collective the identity.

Autograd writes FP32 gradients of BF16 parameters because `p.grad_dtype` says so, and accumulates in place
because `p.grad` exists. Hence `p.grad` must never be set to None: use `Zero1.zero_grad`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.init import Share, all_of_it
from parallel.bucket import Bucket, ParameterRule, make_bucket
from parallel.groups import Group, Pending
from parallel.mesh import Reduction, single_process
from parallel.pieces import Holding

BUCKET_ELEMENTS = 1 << 27
"""A bucket is closed when it holds this many elements: what is in flight at a time stays near 512 MiB."""

Named = tuple[str, nn.Parameter, Share]


class Zero1:
    """Moves parameters into flat buckets and keeps their FP32 gradients and masters.

    Args:
        named_parameters: name and parameter, each parameter once. Their values are kept; afterwards
            `data` and `grad` of each are views of its bucket.
        rule: chooses the update rule of a parameter, and with it the bucket.
        share: which piece of the whole parameter a name stands for here.
        reduction: the processes that sum a parameter's gradient; one process by default.
        stage: the pipeline stage whose end completes a parameter's gradient; None for the end of all.
        world: all processes, for the norm.

    Raises:
        ValueError: if a parameter is given under two names, because it would be updated twice.
    """

    buckets: list[Bucket]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        rule: Callable[[str, nn.Parameter], ParameterRule],
        share: Callable[[str], Share] = all_of_it,
        reduction: Callable[[str], Reduction] | None = None,
        stage: Callable[[str], int | None] = lambda name: None,
        world: Group | None = None,
    ) -> None:
        alone = single_process()
        self._world = world or alone.world
        self._reducing: dict[int, Pending] = {}
        members: dict[object, list[Named]] = {}
        closed: list[tuple[Reduction, list[Named]]] = []
        seen: dict[int, str] = {}
        for name, parameter in named_parameters:
            first = seen.setdefault(id(parameter), name)
            if first != name:
                raise ValueError(f"parameters {first} and {name} are one tensor; give it under one name")
            over = reduction(name) if reduction else alone.dense
            # the processes and not the axes: axes of one process would only make more buckets
            key = (
                parameter.dtype,
                rule(name, parameter),
                stage(name),
                over.shard.ranks,
                over.replicate.ranks,
            )
            if sum(p.numel() for _, p, _ in members.get(key, [])) >= BUCKET_ELEMENTS:
                del members[key]
            if key not in members:
                members[key] = []
                closed.append((over, members[key]))
            members[key].append((name, parameter, share(name)))
        self.buckets = [
            make_bucket(named, rule(*named[0][:2]), over, stage(named[0][0])) for over, named in closed
        ]

    def zero_grad(self) -> None:
        """Set all gradients to zero in place."""
        for bucket in self.buckets:
            bucket.grad.zero_()

    def start_reduce(self, stage: int) -> None:
        """Begin to sum the gradients that are complete once `stage` has made its last backward pass."""
        for index, bucket in enumerate(self.buckets):
            if bucket.stage == stage:
                self._reducing[index] = bucket.start_reduce()

    @torch.no_grad()
    def finish_reduce(self) -> None:
        """Sum the gradients that are not being summed yet; return when all are complete."""
        for index, bucket in enumerate(self.buckets):
            if index not in self._reducing:
                self._reducing[index] = bucket.start_reduce()
        for index, pending in self._reducing.items():
            self.buckets[index].finish_reduce(pending)
        self._reducing.clear()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradients: FP32 scalar, on the buckets' device.

        Equal on all processes; not finite if any gradient of any of them is not finite.
        """
        square = torch.stack([bucket.square_sum() for bucket in self.buckets]).sum()
        return self._world.all_reduce(square).sqrt().float()

    @torch.no_grad()
    def scale_grad(self, factor: Tensor | float) -> None:
        """Multiply the gradients that this process owns by a factor."""
        for bucket in self.buckets:
            bucket.own_grad.mul_(factor)

    @torch.no_grad()
    def publish(self) -> None:
        """Write every master to the parameters the model computes with, on all processes."""
        for bucket in self.buckets:
            bucket.publish()
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Fetch the published parameters of the ranges that other processes own."""
        for pending in [bucket.start_gather() for bucket in self.buckets]:
            pending.wait()

    def masters(self) -> list[Tensor]:
        """Return the FP32 masters of each bucket that this process owns."""
        return [bucket.master for bucket in self.buckets]

    def named_views(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """Return, by parameter name, the views of per-bucket flat tensors in the parameters' shapes."""
        return {
            slot.name: slot.view(flat)
            for bucket, flat in zip(self.buckets, flats, strict=True)
            for slot in bucket.slots
        }

    def stored(self, own: list[Tensor], *, name: str) -> dict[str, Holding]:
        """Return what a checkpoint stores of per-bucket tensors like the masters, as views.

        name: of an entry, with "{}" for that of the parameter. Whole parameters are tensors, others pieces.
        """
        return {
            name.format(slot.name): slot.stored(tensor, bucket.first)
            for bucket, tensor in zip(self.buckets, own, strict=True)
            for slot in bucket.slots
        }
