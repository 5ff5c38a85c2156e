"""Parameters as DeepSpeed wants them, and where each of them lies in DeepSpeed's flat FP32 tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parallel.bucket import ParameterRule, Slot
from parallel.mesh import Reduction
from parallel.model import ParallelModel
from parallel.pieces import Holding
from train.config import OptimizerConfig
from train.optimizer import parameter_rule


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of one storage type, one update rule and one set of processes that sum their gradients."""

    rule: ParameterRule
    reduction: Reduction
    named: dict[str, nn.Parameter] = field(default_factory=dict)

    def for_optimizer(self) -> dict[str, Any]:
        """Return the group as an optimizer takes it; DeepSpeed finds its processes by its name."""
        return {
            "params": list(self.named.values()),
            "decay": self.rule.decay,
            "lr_multiplier": self.rule.lr_multiplier,
            "name": self.reduction.shard.name,
        }


def parameter_groups(model: ParallelModel, config: OptimizerConfig) -> list[ParameterGroup]:
    """Return the groups of this process's parameters, FP32 ones first.

    DeepSpeed takes the type of all gradients from the first parameter.
    """
    rule = parameter_rule(config)
    groups: dict[object, ParameterGroup] = {}
    named = sorted(model.named_parameters().items(), key=lambda item: item[1].dtype != torch.float32)
    for name, parameter in named:
        over = model.sharding.reduction(name)
        key = (parameter.dtype, rule(name, parameter), over.shard.ranks, over.replicate.ranks)
        group = groups.setdefault(key, ParameterGroup(rule=rule(name, parameter), reduction=over))
        group.named[name] = parameter
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process has its part of a parameter: elements [begin, end) of flat tensor `flat`.

    `first` is the index that element `begin` has in the numbering in which `slot.offset` places the
    parameter. The interval may reach beyond the parameter, and may miss it.
    """

    slot: Slot
    flat: int
    begin: int
    end: int
    first: int

    def of(self, flats: Sequence[Tensor]) -> Holding:
        """Return what tensors like the flat ones hold of the parameter, as views."""
        return self.slot.stored(flats[self.flat][self.begin : self.end], self.first)
