"""ZeRO stages 1 and 2 (arXiv 1910.02054) of DeepSpeed: whole weights, and optimizer state in shards.

    stage 1   gradients are whole, and summed at the end of a step. Until then anyone may add to `p.grad`,
              as schedules do that split the backward pass
    stage 2   gradients are summed in every backward pass, and only the range owned here is kept

`p.grad` is FP32 whatever the type of the weight, and so is all that DeepSpeed makes of it, because the first
parameter is FP32. (A pipeline rank with the embedding alone may have none: DeepSpeed then moves what is in
`p.grad` to FP32 accumulators of its own.) Both stages sum by all-reduce; each process then takes its range.

What is not summed over all data-parallel ranks alone, such as experts, or the embedding at both ends of a
pipeline, DeepSpeed is told to be "MoE": it looks up the processes by the name of the group.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import finalize

import torch
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from parallel.bucket import Slot
from parallel.mesh import Mesh
from parallel.sharding import Sharding
from train.engines.deepspeed_groups import ParameterGroup, Place
from train.engines.deepspeed_optimizer import (
    BUCKET_ELEMENTS,
    Clip,
    after_each_backward,
    offloaded_gradients,
    take_step,
)
from train.engines.deepspeed_start import Handles
from train.engines.flat_adamw import FlatAdamW


class _Optimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer with the norm that it is given."""

    given_norm: Tensor

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Return the norm of the gradients as they are, loss scale included."""
        return self.given_norm

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return False: a norm that is not finite says it."""
        return False


class ShardedState:
    """`ZeroStage` for stage 1, or 2 with `shard_gradients`."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        optimizer: FlatAdamW,
        sharding: Sharding,
        handles: Handles,
        *,
        shard_gradients: bool,
        offload: DeepSpeedZeroOffloadOptimizerConfig | None,
    ) -> None:
        self._groups, self._shards_gradients = groups, shard_gradients
        self._names = {parameter: name for group in groups for name, parameter in group.named.items()}
        others = _mark_other_groups(groups, optimizer, sharding.mesh, handles)
        self._zero = _Optimizer(
            optimizer,
            self._names,
            NoopTimer(),
            {},
            contiguous_gradients=True,  # without it, gradients of experts come out wrong, silently
            reduce_bucket_size=BUCKET_ELEMENTS,
            dp_process_group=handles.of(sharding.mesh.dense.shard),
            expert_parallel_group={},
            expert_data_parallel_group=others,
            has_moe_layers=bool(others),
            offload_optimizer_config=offload,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            gradient_average=False,
            partition_grads=shard_gradients,
            parameter_alignment=True,
        )
        # hooks on parameters hold the optimizer, which holds the parameters; no collector sees through hooks
        finalize(self, self._zero.destroy).atexit = False
        if shard_gradients:
            after_each_backward(self._zero)
            self._accumulate_offloaded_in_fp32()
        else:
            for hook in self._zero._grad_acc_hooks:
                hook.remove()  # a stage without work in the backward pass
        self.flats: list[Tensor] = self._zero.single_partition_of_fp32_groups
        self.places = self._find_places(sharding)

    def reduce(self) -> list[Tensor]:
        """Return the gradients owned here, summed."""
        zero = self._zero
        if self._shards_gradients:
            zero.finalize_gradient_accumulation_boundary()
        else:
            self._complete_gradients()
            zero.reduce_gradients(pipeline_parallel=True)
        flats = [self._gradient(index) for index in range(len(self._groups))]
        for group, flat in zip(self._groups, flats, strict=True):
            group.reduction.replicate.all_reduce(flat)
        return flats

    def update(self, clip: Clip) -> None:
        """Clip, let the optimizer step, publish the weights, forget the gradients."""
        take_step(self._zero, clip)
        self._zero.zero_grad()
        if self._zero.cpu_offload:
            for gradient in (*offloaded_gradients(self.flats), *self._zero.accumulated_grads_in_cpu.values()):
                gradient.zero_()
        if self._shards_gradients:
            self._zero.set_gradient_accumulation_boundary(False)

    def publish(self) -> None:
        """Write the masters to the parameters, on all processes."""
        self._zero.update_lp_params()

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: parameters are always whole."""
        return nullcontext()

    def _accumulate_offloaded_in_fp32(self) -> None:
        """Make the buffers in CPU memory where passes add up; DeepSpeed's would have the weights' type."""
        zero = self._zero
        if not zero.cpu_offload:
            return
        for parameter in (p for parameters in zero.params_in_partition for p in parameters):
            buffer = torch.zeros(parameter.numel(), pin_memory=zero.cpu_offload_pin_memory)
            zero.accumulated_grads_in_cpu[zero.get_param_id(parameter)] = buffer

    def _complete_gradients(self) -> None:
        """Give each parameter a gradient: processes must agree on which ones they sum."""
        if self._zero.use_grad_accum_attribute:
            self._zero.fill_grad_accum_attribute()
        for parameter in self._names:
            if self._zero.get_gradient_for_reduction(parameter) is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
                if self._zero.use_grad_accum_attribute:
                    self._zero.fill_grad_accum_attribute()

    def _gradient(self, index: int) -> Tensor:
        """Return a group's gradients owned here as one tensor, which is made the one that DeepSpeed uses."""
        zero = self._zero
        if zero.cpu_offload:
            return offloaded_gradients(self.flats)[index]
        pieces = zero.averaged_gradients[index]
        flat = getattr(pieces, "flat_partition", None)
        if flat is None:
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            zero.averaged_gradients[index] = [flat]
        return flat

    def _find_places(self, sharding: Sharding) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for index, parameters in enumerate(self._zero.bit16_groups):
            length = int(self._zero.partition_size[index])
            first = self._groups[index].reduction.shard.rank * length
            offsets = self._zero.round_robin_bit16_offsets[index]
            for parameter, offset in zip(parameters, offsets, strict=True):
                name = self._names[parameter]
                slot = Slot(name, offset, parameter.shape, sharding.share(name))
                places[name] = Place(slot=slot, flat=index, begin=0, end=length, first=first)
        return places


def _mark_other_groups(
    groups: Sequence[ParameterGroup], optimizer: FlatAdamW, mesh: Mesh, handles: Handles
) -> dict[str, torch.distributed.ProcessGroup]:
    """Mark what is not summed over the data-parallel ranks as DeepSpeed's MoE; return the groups by name."""
    others: dict[str, torch.distributed.ProcessGroup] = {}
    for group, of_optimizer in zip(groups, optimizer.param_groups, strict=True):
        over = group.reduction.shard
        if over.ranks == mesh.dense.shard.ranks:
            continue
        others[over.name] = handles.of(over)
        of_optimizer["moe"] = True
        for parameter in group.named.values():
            vars(parameter).update(allreduce=False, group_name=over.name)
    return others
