"""The optimizer engine that a layout asks for; DeepSpeed is imported only where it is."""

import os
from typing import TYPE_CHECKING

import torch

from parallel.config import Engine as EngineName
from parallel.config import ParallelConfig
from parallel.model import ParallelModel
from train.config import OptimizerConfig
from train.engines.engine import Engine
from train.engines.zero1 import Zero1Engine

if TYPE_CHECKING:
    from train.engines.deepspeed import DeepSpeedEngine


def build_engine(model: ParallelModel, config: OptimizerConfig, parallel: ParallelConfig) -> Engine:
    """Return the engine of this process's parts of the model; all processes call this together."""
    match parallel.engine:
        case EngineName.zero1:
            return Zero1Engine(model, config)
        case EngineName.deepspeed:
            make = deepspeed_engine(next(iter(model.named_parameters().values())).device)
            return make(model, config, parallel)


def deepspeed_engine(device: torch.device) -> "type[DeepSpeedEngine]":
    """Import DeepSpeed for a device, which takes seconds, and return the engine on it."""
    # it picks its accelerator when it is imported, and would guess
    os.environ["DS_ACCELERATOR"] = device.type
    from train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine
