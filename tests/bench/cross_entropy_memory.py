"""Measure how the peak memory of a training step grows with vocabulary and tokens, fused head against plain.

    python -m tests.bench.cross_entropy_memory
    python -m tests.bench.cross_entropy_memory --vocabularies 32768 129280 --tokens 2048 4096 8192

Each point runs forward, loss, backward and AdamW of a small two-layer FP32 model in a process of its own and
reads the peak resident memory above what model and optimizer hold already. `fused` is the trainer's own
objective; `plain` is the same step with whole FP32 logits and torch's cross-entropy. Prints one JSON line per
point, then one per head and vocabulary with the growth in bytes per token between the least and the most
tokens. Give tokens from 2048 on: the fused head's buffer reaches its full size at 1024.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace

from tests.bench.train_step import TINY

SEQUENCE = 512


def main() -> None:
    """Measure all points, or the one that a child process was started for."""
    args = _arguments()
    if args.point:
        print(_peak_above_model(args.point[0], int(args.point[1]), int(args.point[2])))
        return
    for head in ("fused", "plain"):
        for vocab in args.vocabularies:
            peaks = [_measure(head, vocab, tokens) for tokens in args.tokens]
            growth = (peaks[-1] - peaks[0]) / (args.tokens[-1] - args.tokens[0])
            print(json.dumps({"head": head, "vocab": vocab, "bytes_per_token": round(growth)}), flush=True)


def _measure(head: str, vocab: int, tokens: int) -> int:
    command = [sys.executable, "-m", "tests.bench.cross_entropy_memory", "--point", head, vocab, tokens]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    record = {"head": head, "vocab": vocab, "tokens": tokens, "peak_mib": round(peak / 2**20, 1)}
    print(json.dumps(record), flush=True)
    return peak


def _peak_above_model(head: str, vocab: int, tokens: int) -> int:
    """Return the bytes that two training steps need on top of weights, gradients, masters and moments."""
    import torch

    from model.kernels import reference
    from model.transformer import ModelOutput, Transformer
    from parallel.schedule import Batch, LocalSchedule, MicrobatchLoss
    from parallel.zero1 import Zero1
    from train.config import OptimizerConfig
    from train.loss import Objective
    from train.optimizer import AdamW, parameter_rule

    torch.set_num_threads(1)
    config = replace(TINY, vocab_size=vocab, num_layers=2)
    model = Transformer(config)
    weight_VD = model.head.weight

    def plain(
        output: ModelOutput, labels_BKS: torch.Tensor, *, valid_K: torch.Tensor, **_: float
    ) -> MicrobatchLoss:
        hidden_TD = output.hidden_KBSD[0].flatten(0, 1)
        weights_T = (1 / valid_K).float().expand(hidden_TD.shape[0])
        total, losses_T = reference.linear_cross_entropy(
            hidden_TD, weight_VD, labels_BKS[:, 0].flatten(), weights_T
        )
        return MicrobatchLoss(total=total, loss_sums_K=losses_T.sum()[None])

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    engine = Zero1(model.named_parameters(), rule=parameter_rule(OptimizerConfig()))
    optimizer = AdamW(engine, OptimizerConfig())
    batch_size = tokens // SEQUENCE
    ids_BS = torch.randint(0, vocab, (batch_size, SEQUENCE + 1))
    batch = Batch(
        tokens_BKS=ids_BS[:, None, :-1].contiguous(),
        labels_BKS=ids_BS[:, None, 1:].contiguous(),
        positions_BS=torch.arange(SEQUENCE).expand(batch_size, -1).contiguous(),
        valid_K=torch.tensor([tokens]),
        global_sequences=batch_size,
    )
    loss_function = Objective(weight_VD) if head == "fused" else plain
    schedule = LocalSchedule(model, loss_function, microbatch_size=batch_size)
    engine.zero_grad()
    optimizer.step(lr=0.0)  # touches every page of gradients and moments
    before = _resident()
    for _ in range(2):
        schedule.step(batch)
        optimizer.step(lr=1e-4)
        engine.zero_grad()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 129280])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
