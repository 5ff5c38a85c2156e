"""A run directory as a real three-stage run leaves it, made in a moment: losses fall, experts even out.

`python -m tests.train.fake_run DIR` writes one to look at the report with.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import AttentionConfig, Gemm, ModelConfig, MoEConfig, PrecisionConfig, YarnConfig
from model.cost import flops_per_token
from parallel.cluster import ClusterConfig
from train.config import BatchConfig, LoggingConfig, RunConfig, StageConfig, WandbMode
from train.logs.metrics import StepResult, step_record
from train.logs.sinks import JsonlSink
from train.stored_config import config_text

UNIFORM, UNIGRAM, BIGRAM = math.log(4096), 6.71, 4.38
LAYERS = ["layers.1", "layers.2", "layers.3", "layers.4", "mtp.0"]
NUM_EXPERTS = 32
PEAK_TFLOPS = 0.8
FP8_EVERY = 10


@dataclass(frozen=True)
class FakeStage:
    name: str
    seq_len: int
    batch_size: int
    steps: int


STAGES = [
    FakeStage("pretrain", 128, 32, 420),
    FakeStage("extend_32k", 1024, 4, 90),
    FakeStage("extend_128k", 4096, 1, 60),
]


def fake_config(stages: list[FakeStage] = STAGES) -> RunConfig:
    yarn = YarnConfig(factor=40, original_length=128)
    return RunConfig(
        recipe="smoke",
        name="smoke",
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=5,
            num_dense_layers=1,
            dense_intermediate_size=1024,
            attention=AttentionConfig(
                num_heads=4,
                q_lora_rank=96,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
            ),
            moe=MoEConfig(
                num_experts=NUM_EXPERTS, top_k=4, intermediate_size=128, num_groups=4, top_k_groups=2
            ),
        ),
        cluster=ClusterConfig(name="laptop", peak_tflops=PEAK_TFLOPS),
        precision=PrecisionConfig(gemm=Gemm.fp8_reference),
        logging=LoggingConfig(wandb=WandbMode.disabled, histogram_every=20, fp8_every=FP8_EVERY),
        stages={
            s.name: StageConfig(
                seq_len=s.seq_len,
                num_tokens=s.seq_len * s.batch_size * s.steps,
                batch=BatchConfig(start=s.batch_size, end=s.batch_size),
                yarn=None if i == 0 else yarn,
            )
            for i, s in enumerate(stages)
        },
    )


def fake_results(rng: np.random.Generator, stages: list[FakeStage] = STAGES) -> Iterator[StepResult]:
    step = tokens = 0
    skew_LE = rng.normal(0, 1.0, (len(LAYERS), NUM_EXPERTS))
    for index, stage in enumerate(stages):
        stage_tokens = 0
        for i in range(stage.steps):
            step += 1
            tokens += stage.seq_len * stage.batch_size
            stage_tokens += stage.seq_len * stage.batch_size
            progress = step / 120
            # A new length costs a little at first and is learnt quickly.
            bump = 0.5 * math.exp(-i / 12) if index else 0.0
            loss = 3.0 + (UNIFORM - 3.0) * math.exp(-progress) + bump + rng.normal(0, 0.05) - 0.05 * index
            skipped = step in (37, 260)
            load_LE = _fake_load(rng, skew_LE * (0.25 + math.exp(-progress)), dead=step < 60)
            half = 0.5 * (1 + math.cos(math.pi * i / stage.steps))
            yield StepResult(
                step=step,
                stage=stage.name,
                tokens=tokens,
                stage_tokens=stage_tokens,
                seq_len=stage.seq_len,
                batch_size=stage.batch_size,
                loss=math.nan if skipped else loss,
                mtp_loss=[loss + 0.45 + rng.normal(0, 0.03)],
                balance_loss=2e-4 * (1 + math.exp(-progress)),
                lr=3e-3 * min(1.0, step / 30) * (0.1 + 0.9 * half) * 0.3**index,
                mtp_weight=0.3 if index == 0 else 0.1,
                bias_speed=0.001 if index == 0 else 0.0,
                grad_norm=math.inf
                if skipped
                else 0.4 + 3 * math.exp(-progress * 3) + abs(rng.normal(0, 0.12)) + bump,
                skipped=skipped,
                loss_scale=None,
                load_LE=load_LE,
                bias_LE=torch.from_numpy(-skew_LE * 0.05 * (1 - math.exp(-progress))).float(),
                seconds=(0.42 + 0.1 * index) * (1 + 0.08 * abs(rng.normal())),
                fp8=fake_fp8(step) if step % FP8_EVERY == 0 else None,
            )


def fake_fp8(step: int) -> dict[str, dict[str, float]]:
    """Return shares that differ by class and grow slowly, as gradients shrink."""
    kinds = ("weights", "activations", "expert_rows", "gradients")
    return {
        kind: {
            "underflow": i * 1e-3 * (1 + step / 600),
            "saturated": 8e-3 + i * 1e-4,
            "amax": 10.0 ** (1 - i),
        }
        for i, kind in enumerate(kinds)
    }


def _fake_load(rng: np.random.Generator, skew_LE: np.ndarray, *, dead: bool) -> torch.Tensor:
    share_LE = np.exp(skew_LE + rng.normal(0, 0.12, skew_LE.shape))
    if dead:
        share_LE[:, :3] = 0
        share_LE[0, 3:6] = 0
    share_LE /= share_LE.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.stack([rng.multinomial(16384, share) for share in share_LE])).long()


def fake_evaluation(stage: FakeStage, *, index: int, when: str, step: int, tokens: int) -> dict[str, Any]:
    known = STAGES[index - 1].seq_len if index else 0
    edges = [0, *(2**i for i in range(4, int(math.log2(stage.seq_len)) + 1))]
    end = UNIFORM + 0.02 if index == 0 else 3.2 - 0.1 * index

    def loss_at(position: int) -> float:
        curve = end + 1.6 * (position + 8) ** -0.35
        if when == "before" and index and position >= known:
            curve += 0.5 * math.log2(position / known + 1)
        return (
            curve
            - (0.25 if when == "after" and index else 0.0)
            - (UNIFORM - 3.3 if index == 0 and when == "after" else 0)
        )

    lengths = [stage.seq_len >> i for i in (2, 1, 0)]
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    skill = {"before": 0.12, "after": 0.8}[when] if index else {"before": 0.1, "after": 0.45}[when]
    grid = [
        [round(min(1.0, max(0.0, skill + 0.25 * (d - 0.5) - 0.08 * row)) * 4) / 4 for d in depths]
        for row in range(len(lengths))
    ]
    parts = [{"from": a, "to": b, "loss": loss_at((a + b) // 2)} for a, b in pairwise(edges)]
    mean = sum(part["loss"] * (part["to"] - part["from"]) for part in parts) / stage.seq_len
    return {
        "stage": stage.name,
        "step": step,
        "tokens": tokens,
        "seq_len": stage.seq_len,
        "when": when,
        "held_out": {
            "loss": mean, "uniform": UNIFORM, "unigram": UNIGRAM, "bigram": BIGRAM, "num_tokens": 131072,
        },
        "by_position": parts,
        "needle": {"lengths": lengths, "depths": depths, "grid": grid, "chance": 0.1},
    }  # fmt: skip


def write_fake_run(run_dir: Path, stages: list[FakeStage] = STAGES, *, histogram_every: int = 20) -> Path:
    """Write a whole run directory through the code that a real run uses."""
    config = fake_config(stages)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config_text(config), encoding="utf-8")
    sink = JsonlSink(run_dir / "metrics.jsonl", resume_step=0)
    for result in fake_results(np.random.default_rng(0), stages):
        sink.write(
            step_record(
                result,
                layer_names=LAYERS,
                flops_per_token=flops_per_token(config.model, result.seq_len),
                peak_tflops=PEAK_TFLOPS,
                histogram=result.step % histogram_every == 0,
            )
        )
    sink.close()
    (run_dir / "evaluations").mkdir(exist_ok=True)
    step = tokens = 0
    for index, stage in enumerate(stages):
        for when in ("before", "after"):
            result = fake_evaluation(stage, index=index, when=when, step=step, tokens=tokens)
            path = run_dir / "evaluations" / f"{stage.name}-{when}.json"
            path.write_text(json.dumps(result), encoding="utf-8")
            if when == "before":
                step += stage.steps
                tokens += stage.steps * stage.seq_len * stage.batch_size
    return run_dir


if __name__ == "__main__":
    print(write_fake_run(Path(sys.argv[1])))
