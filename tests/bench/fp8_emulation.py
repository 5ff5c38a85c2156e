"""Time the emulated FP8 linear map against BF16, forward and backward, on a CPU.

    python -m tests.bench.fp8_emulation --sizes 1024 2048

Square: as many tokens as input and output channels. Both maps take the same BF16 tensors, accumulate the
gradient of the weight in FP32, as training does, and alternate, one pass of each; `ratio` is the median of
the ratios of neighbours, `forward` that of their forward passes alone. Codes of the weight are made once, as
for all microbatches of a step but the first, or with `--new-weights` in every pass. One JSON line for each
size.

Time is that of the process (`--clock cpu`), which other work on the machine disturbs little, or of the wall.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Fp8Scales, Gemm, PrecisionConfig
from model.fp8 import Fp8Policy
from model.kernels.allocator import keep_freed_memory

Clock = Callable[[], float]
Pass = Callable[[Clock], tuple[float, float]]
"""Runs a linear map forward and backward, adds up its gradients, and returns the seconds of both parts."""
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}


def make_pass(function: Callable[[Tensor, Tensor], Tensor], size: int) -> Pass:
    """Return a pass of a map of `size` tokens, input and output channels."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(size, size, generator=generator).bfloat16() for _ in range(3))
    x.requires_grad_()
    parameter = nn.Parameter(weight)
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros(size, size, dtype=torch.float32)

    def run(clock: Clock) -> tuple[float, float]:
        x.grad = None
        start = clock()
        y = function(x, parameter)
        middle = clock()
        y.backward(grad)
        return middle - start, clock() - middle

    return run


def measure(size: int, args: argparse.Namespace) -> dict[str, object]:
    """Return the record of one size."""
    policy = Fp8Policy(PrecisionConfig(gemm=Gemm.fp8_reference, fp8_scales=Fp8Scales(args.scales)))
    fp8 = partial(policy.linear, scales=policy.linear_scales("ffn.w1"))
    passes = {"bf16": make_pass(F.linear, size), "fp8": make_pass(fp8, size)}
    clock = CLOCKS[args.clock]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for repeat in range(2 + args.repeats):
        if args.new_weights:
            policy.weights.forget()
        for name, run in passes.items():
            seconds = run(clock)
            if repeat >= 2:
                times[name].append(seconds)
    pairs = list(zip(times["fp8"], times["bf16"], strict=True))
    return {
        "bench": "fp8_emulation",
        "size": size,
        "scales": args.scales,
        "new_weights": args.new_weights,
        "threads": args.threads,
        "clock": args.clock,
        "ms": {name: round(1e3 * statistics.median(map(sum, values)), 1) for name, values in times.items()},
        "ratio": round(statistics.median(sum(fp8) / sum(bf16) for fp8, bf16 in pairs), 2),
        "forward": round(statistics.median(fp8[0] / bf16[0] for fp8, bf16 in pairs), 2),
        "torch": torch.__version__,
        "load1": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Run the sizes and print their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--scales", choices=list(Fp8Scales), default=Fp8Scales.power_of_two)
    parser.add_argument("--new-weights", action="store_true", help="quantise the weight in every pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        print(json.dumps(measure(size, args)), flush=True)


if __name__ == "__main__":
    main()
