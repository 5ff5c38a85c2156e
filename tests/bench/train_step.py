"""Time one training step on the CPU: forward, loss, backward, AdamW, on random token ids.

    python -m tests.bench.train_step --threads 2 --warmup 2 --steps 5
    python -m tests.bench.train_step --preset bench-small-v129k --threads 2

Prints one JSON line: tokens/s, step time, FLOP/s, page faults, peak memory, losses. The step is the trainer's
own: `LocalSchedule` over `Transformer` and `Objective`, then `AdamW` on the `Zero1` engine: BF16 weights and
activations, FP32 gradients and masters. Gradient clipping is left out unless `--clip` asks for it, and
moments are FP32 unless `--moments bf16`, because the peers that this is compared with
(docs/benchmarks/train_step.md) do neither.
"""

import argparse
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig, Recompute
from model.kernels.allocator import keep_freed_memory

SMALL = ModelConfig(
    vocab_size=32768,
    hidden_size=512,
    num_layers=8,
    num_dense_layers=1,
    dense_intermediate_size=1280,
    num_mtp_layers=0,
    init_std=0.02,
    attention=AttentionConfig(
        num_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
    moe=MoEConfig(num_experts=32, top_k=4, intermediate_size=256, num_groups=4, top_k_groups=2),
)
TINY = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_dense_layers=1,
    dense_intermediate_size=640,
    num_mtp_layers=0,
    init_std=0.02,
    attention=AttentionConfig(
        num_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoEConfig(num_experts=16, top_k=4, intermediate_size=128, num_groups=4, top_k_groups=2),
)
PRESETS = {
    "bench-small": SMALL,
    "bench-small-v129k": replace(SMALL, vocab_size=129280),
    "bench-tiny": TINY,
}


@dataclass(frozen=True)
class StepTimes:
    """Seconds (wall, CPU, optimizer, system) and page faults of each timed step; losses of all steps."""

    wall: list[float]
    cpu: list[float]
    optimizer: list[float]
    faults: list[int]
    system: list[float]
    losses: list[float]
    first: float


def main() -> None:
    """Run the steps and print the record."""
    args = _arguments()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    if args.malloc == "tuned":
        keep_freed_memory()
    import torch  # after the allocator is set

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = TrainingStep(PRESETS[args.preset], args)
    times = _measure(step, args.warmup, args.steps)
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step.backward()
            step.update()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.profile))
    print(json.dumps(_record(args, step, times, rss_before, torch.__version__)), flush=True)


class TrainingStep:
    """Model, engine, optimizer and one fixed batch."""

    def __init__(self, config: ModelConfig, args: argparse.Namespace) -> None:
        import torch

        from model.init import initialize
        from model.transformer import Transformer
        from parallel.schedule import Batch, LocalSchedule
        from parallel.zero1 import Zero1
        from train.config import Moments, OptimizerConfig
        from train.loss import Objective
        from train.optimizer import AdamW, parameter_rule

        self.config, self.clip = config, args.clip
        optimizer = OptimizerConfig(moments=Moments(args.moments))
        model = Transformer(config, compute=Compute(args.compute), recompute=Recompute(args.recompute))
        initialize(model, seed=args.seed)
        self.engine = Zero1(model.named_parameters(), rule=parameter_rule(optimizer))
        self.optimizer = AdamW(self.engine, optimizer)
        self.schedule = LocalSchedule(model, Objective(model.head.weight), microbatch_size=args.batch)
        generator = torch.Generator().manual_seed(1234)
        ids_BS = torch.randint(0, config.vocab_size, (args.batch, args.seq + 1), generator=generator)
        self.batch = Batch(
            tokens_BKS=ids_BS[:, None, :-1].contiguous(),
            labels_BKS=ids_BS[:, None, 1:].contiguous(),
            positions_BS=torch.arange(args.seq).expand(args.batch, -1).contiguous(),
            valid_K=torch.tensor([args.batch * args.seq]),
            global_sequences=args.batch,
        )
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def backward(self) -> float:
        """Run forward and backward; return the loss."""
        self.engine.zero_grad()
        return float(self.schedule.step(self.batch).mean_loss_K[0])

    def update(self) -> None:
        """Update the weights."""
        if self.clip:
            from train.optimizer import clip_grad_norm

            clip_grad_norm(self.engine, max_norm=1.0)
        self.optimizer.step(lr=1e-4)


def _measure(step: TrainingStep, warmup: int, steps: int) -> StepTimes:
    times = StepTimes([], [], [], [], [], [], first=0.0)
    for index in range(warmup + steps):
        before, wall, cpu = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), time.process_time()
        times.losses.append(step.backward())
        middle = time.perf_counter()
        step.update()
        end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if index == 0:
            times = replace(times, first=end - wall)
        if index >= warmup:
            times.wall.append(end - wall)
            times.cpu.append(time.process_time() - cpu)
            times.optimizer.append(end - middle)
            times.faults.append(after.ru_minflt - before.ru_minflt)
            times.system.append(after.ru_stime - before.ru_stime)
    return times


def _record(
    args: argparse.Namespace, step: TrainingStep, times: StepTimes, rss_before: int, torch_version: str
) -> dict[str, Any]:
    from model.cost import flops_per_token

    median, tokens = statistics.median, args.batch * args.seq
    flops = flops_per_token(step.config, args.seq)
    return {
        "bench": "train_step",
        "impl": "fathom",
        **{key: getattr(args, key) for key in ("preset", "batch", "seq", "threads")},
        "dtype": args.compute,
        "optim": f"{args.moments} moments",
        **{key: getattr(args, key) for key in ("recompute", "malloc", "clip")},
        "tok_s_wall_median": round(tokens / median(times.wall), 1),
        "tok_s_wall_best": round(tokens / min(times.wall), 1),
        "tok_per_cpu_s": round(tokens / median(times.cpu), 1),
        "tok_per_cpu_s_best": round(tokens / min(times.cpu), 1),
        "step_s_median": round(median(times.wall), 3),
        "step_s_best": round(min(times.wall), 3),
        "cpu_s_median": round(median(times.cpu), 3),
        "cpu_s_best": round(min(times.cpu), 3),
        "optim_s_median": round(median(times.optimizer), 3),
        "first_step_s": round(times.first, 2),
        "minor_faults_per_step": int(median(times.faults)),
        "sys_s_per_step": round(median(times.system), 3),
        "train_mflop_per_token": round(flops / 1e6, 1),
        "gflops_best_wall": round(flops * tokens / min(times.wall) / 1e9, 1),
        "gflops_median_wall": round(flops * tokens / median(times.wall) / 1e9, 1),
        "params_m": round(step.num_parameters / 1e6, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rss_before_gib": round(rss_before / 2**20, 2),
        "losses": [round(loss, 4) for loss in times.losses],
        "torch": torch_version,
        "load1": round(os.getloadavg()[0], 2),
        "tag": args.tag,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="bench-small", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--moments", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--recompute", default="none", choices=[mode.value for mode in Recompute])
    parser.add_argument("--malloc", default="tuned", choices=["tuned", "plain"])
    parser.add_argument("--clip", action="store_true", help="clip the gradient norm, as the trainer does")
    parser.add_argument("--profile", type=int, default=0, help="print the N operators that take longest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
