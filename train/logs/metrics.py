"""What one optimizer step measured, and the record of it that every sink receives.

Load balance follows "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664, section 4.1): MaxVio is how far
the busiest expert of a layer lies above the mean load, here over the global batch of one step. Beside it
stand the entropy of the load, the spread of the router's bias and the experts that received no token at all.

Everything that differs between two runs of the same steps (time, speed, memory) sits under the key
"timing"; all the rest of a record is reproducible bit for bit.

Legend: L MoE layers (multi-token prediction blocks included), E routed experts of one layer.
"""

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step as the trainer saw it; losses are means over the global batch."""

    step: int  # optimizer steps so far in the run, this one included
    stage: str
    tokens: int  # tokens seen in all stages
    stage_tokens: int  # tokens seen in this stage
    seq_len: int
    batch_size: int  # sequences
    loss: float  # next-token cross-entropy in nats
    mtp_loss: list[float]  # cross-entropy of each multi-token prediction depth, nats, not weighted
    balance_loss: float
    lr: float
    mtp_weight: float
    bias_speed: float
    grad_norm: float  # before clipping
    skipped: bool  # loss or gradient was not finite, so nothing was updated
    loss_scale: float | None  # FP16 only
    load_LE: Tensor  # int64 on the CPU: tokens each expert received
    bias_LE: Tensor  # FP32 on the CPU: router biases after the update
    seconds: float
    fp8: Mapping[str, Mapping[str, float]] | None = None  # what FP8 lost, in the steps that count it


@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """How evenly the experts of each layer are used, one number per layer."""

    max_vio: list[float]  # max(load) / mean(load) - 1: 0 is even, E - 1 is everything on one expert
    entropy: list[float]  # entropy of the load over log E: 1 is even, 0 is everything on one expert
    dead: list[int]  # experts with no token


def load_statistics(load_LE: Tensor) -> LoadStatistics:
    """Summarise exact token counts [L, E] per layer; a layer that saw no token gives nan. L may be 0.

    MaxVio is equation 4 of arXiv 2408.15664 with the mean as expected load.
    """
    if len(load_LE) == 0:
        return LoadStatistics(max_vio=[], entropy=[], dead=[])
    load = load_LE.to(torch.float64)
    total_L = load.sum(dim=1)
    share = load / total_L.unsqueeze(1)
    num_experts = load.shape[1]
    max_vio_L = share.amax(dim=1) * num_experts - 1.0
    if num_experts > 1:
        entropy_L = torch.special.entr(share).sum(dim=1) / math.log(num_experts)
    else:
        # One expert takes everything and is as even as it can be; log E = 0 would hide that.
        entropy_L = share.sum(dim=1)
    return LoadStatistics(
        max_vio=max_vio_L.tolist(),
        entropy=entropy_L.clamp(max=1.0).tolist(),
        dead=(load_LE == 0).sum(dim=1).tolist(),
    )


def peak_memory_gib() -> float:
    """Return the most memory this process has held, in GiB: device memory on CUDA, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def step_record(
    result: StepResult,
    *,
    layer_names: list[str],
    flops_per_token: float,
    peak_tflops: float | None,
    histogram: bool,
    num_devices: int = 1,
) -> dict[str, Any]:
    """Return the record of one step, made of plain Python values.

    `layer_names` names the rows of `load_LE`; `flops_per_token` counts forward and backward;
    `peak_tflops` is one device's, null when unknown, and then so is the model FLOP utilisation.
    With `histogram` the token counts themselves are included.
    """
    statistics = load_statistics(result.load_LE)
    bias_range_L = [float(bias_E.max() - bias_E.min()) for bias_E in result.bias_LE]
    record: dict[str, Any] = {
        "step": result.step,
        "stage": result.stage,
        "tokens": result.tokens,
        "stage_tokens": result.stage_tokens,
        "seq_len": result.seq_len,
        "batch_size": result.batch_size,
        "loss": result.loss,
        "mtp_loss": list(result.mtp_loss),
        "balance_loss": result.balance_loss,
        "lr": result.lr,
        "mtp_weight": result.mtp_weight,
        "bias_speed": result.bias_speed,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
    }
    if result.loss_scale is not None:
        record["loss_scale"] = result.loss_scale
    record["max_vio"] = dict(zip(layer_names, statistics.max_vio, strict=True))
    record["load_entropy"] = dict(zip(layer_names, statistics.entropy, strict=True))
    record["bias_range"] = dict(zip(layer_names, bias_range_L, strict=True))
    record["dead_experts"] = dict(zip(layer_names, statistics.dead, strict=True))
    if histogram:
        record["load"] = dict(zip(layer_names, result.load_LE.tolist(), strict=True))
    if result.fp8 is not None:
        record["fp8"] = {kind: dict(values) for kind, values in result.fp8.items()}
    record["timing"] = _timing(
        result, flops_per_token=flops_per_token, peak_tflops=peak_tflops, num_devices=num_devices
    )
    return record


def _timing(
    result: StepResult, *, flops_per_token: float, peak_tflops: float | None, num_devices: int
) -> dict[str, float | None]:
    tokens_per_second = result.batch_size * result.seq_len / result.seconds
    flops_per_second = tokens_per_second * flops_per_token
    mfu = None if peak_tflops is None else flops_per_second / (peak_tflops * 1e12 * num_devices)
    return {
        "seconds": result.seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_second": flops_per_second,
        "mfu": mfu,
        "memory_gib": peak_memory_gib(),
    }
