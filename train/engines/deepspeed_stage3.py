"""ZeRO stage 3 (arXiv 1910.02054) of DeepSpeed: weights in shards too, fetched module by module when needed.

DeepSpeed's hooks on modules gather a module's own weights before its forward and backward passes and let them
go afterwards. What the model does besides gets special treatment:

- The head's weight is read by the loss, which is no module. Norms are run again in the backward pass of what
  follows them (model/recompute.py). A gate returns a dataclass, in which hooks find no tensor to wait for.
  The weights of all these stay whole on every process ("persistent"); each still updates its shard alone.
- Experts take a dataclass, so their weights, most of the model, would stay until a backward pass is over.
  Another hook lets DeepSpeed see the tensor in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import getclosurevars
from itertools import accumulate
from typing import Any
from weakref import finalize

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import defragment
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from model.dispatch import Dispatched
from model.experts import Experts
from model.norm import RMSNorm
from model.router import Router
from model.transformer import Transformer
from parallel.bucket import Slot
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


class _Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's optimizer with the norm that it is given, for parameters of several types."""

    given_norm: Tensor

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.given_norm]

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return False: a norm that is not finite says it."""
        return False

    # DeepSpeed moves the shards of all weights into one flat tensor, of one type; here each group has one.

    def _get_parameter_partitions(self) -> list[Tensor]:
        return self.fp16_partitioned_groups[0]

    def _set_fp16_partitioned_groups_flat(self) -> None:
        others = [defragment(shards) for shards in self.fp16_partitioned_groups[1:]]
        self.fp16_partitioned_groups_flat += [self.lp_param_buffer, *others]


class ShardedWeights:
    """`ZeroStage` for stage 3."""

    def __init__(
        self,
        model: Transformer,
        groups: Sequence[ParameterGroup],
        optimizer: FlatAdamW,
        sharding: Sharding,
        handles: Handles,
        *,
        offload: DeepSpeedZeroOffloadOptimizerConfig | None,
    ) -> None:
        self._groups = groups
        self._names: dict[Any, str] = {
            parameter: name for group in groups for name, parameter in group.named.items()
        }
        self._shard_weights(model, sharding, handles)
        self._zero = _Optimizer(
            model,
            optimizer,
            self._names,
            NoopTimer(),
            _configuration(),
            reduce_bucket_size=BUCKET_ELEMENTS,
            max_reuse_distance=0,
            param_persistence_threshold=0,
            dp_process_group=handles.of(sharding.mesh.dense.shard),
            offload_optimizer_config=offload,
            offload_ratio=1.0,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
        )
        finalize(self, _forget, self._zero, model).atexit = False
        self._persist(model)
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(_show_rows)
        after_each_backward(self._zero)
        self.flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        self.places = self._find_places(sharding)

    def reduce(self) -> list[Tensor]:
        """Return the gradients owned here, summed."""
        self._zero.finalize_gradient_accumulation_boundary()
        flats = self._gradients()
        for group, flat in zip(self._groups, flats, strict=True):
            flat.mul_(group.reduction.shard.size)  # DeepSpeed's is the mean
            group.reduction.replicate.all_reduce(flat)
        return flats

    def update(self, clip: Clip) -> None:
        """Clip, let the optimizer step, publish the weights, forget the gradients."""
        take_step(self._zero, clip)
        self._gather_persistent()  # DeepSpeed leaves that out with a step that it skips
        self._zero.zero_grad()
        # a weight without a gradient in the next step would keep that of this one
        self._zero.grad_partitions_flat_buffer.zero_()
        if self._zero.offload_optimizer:
            for gradient in offloaded_gradients(self.flats):
                gradient.zero_()
        self._zero.set_gradient_accumulation_boundary(False)

    def publish(self) -> None:
        """Write the masters to the parameters, on all processes."""
        self._zero._partition_all_parameters()
        for index in range(len(self._groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._gather_persistent()

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Gather the parameters that are not whole now, and let them go afterwards."""
        sharded = [p for p in self._names if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        with deepspeed.zero.GatheredParameters(sharded):
            yield

    def _shard_weights(self, model: Transformer, sharding: Sharding, handles: Handles) -> None:
        for group in self._groups:
            for parameter in group.named.values():
                vars(parameter)["ds_zero_partition_process_group"] = handles.of(group.reduction.shard)
        deepspeed.zero.Init(
            module=model,
            data_parallel_group=handles.of(sharding.mesh.dense.shard),
            config_dict_or_path=_configuration(),
        )

    def _persist(self, model: Transformer) -> None:
        modules = [m for m in model.modules() if isinstance(m, RMSNorm | Router)]
        for module in (*modules, model.head):
            parameter: Any
            for parameter in module.parameters(recurse=False):
                # the first alone is forgotten while DeepSpeed learns the order of modules
                parameter.ds_persist = parameter.is_external_param = True
                self._zero.persistent_parameters.append(parameter)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        sharded = [
            p for p in self._zero.persistent_parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE
        ]
        if sharded:
            sharded[0].all_gather(sharded)

    def _gradients(self) -> list[Tensor]:
        zero = self._zero
        if zero.offload_optimizer:
            return offloaded_gradients(self.flats)
        flats = list(zero.grad_partitions_flat_buffer.split(zero.fp16_partitioned_groups_flat_numel))
        zero.averaged_gradients = {index: [flat] for index, flat in enumerate(flats)}
        return flats

    def _find_places(self, sharding: Sharding) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for index, parameters in enumerate(self._zero.fp16_groups):
            rank = self._groups[index].reduction.shard.rank
            ends = accumulate(parameter.partition_numel() for parameter in parameters)
            for parameter, end in zip(parameters, ends, strict=True):
                name, length = self._names[parameter], parameter.partition_numel()
                slot = Slot(name, 0, parameter.ds_shape, sharding.share(name))
                places[name] = Place(slot=slot, flat=index, begin=end - length, end=end, first=rank * length)
        return places


def _forget(optimizer: _Optimizer, model: Transformer) -> None:
    """Take a model out of what DeepSpeed would keep as long as the process lives: hooks, a list, a cache."""
    optimizer.destroy()
    FWD_MODULE_STACK.remove(model)
    method: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    getclosurevars(method).nonlocals["func"].cache_clear()


def _configuration() -> dict[str, Any]:
    """Return what DeepSpeed insists on reading from a configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
    }


def _show_rows(experts: nn.Module, arguments: tuple[Dispatched]) -> tuple[Dispatched]:
    """Mark the rows that experts take as their input, so that their weights go when its gradient is there."""
    (dispatched,) = arguments
    seen: Any = experts
    return (replace(dispatched, rows_RD=seen.post_bwd_fn.apply(dispatched.rows_RD)),)
