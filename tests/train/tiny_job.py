"""A three-stage job on a small real corpus that trains in a few seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.golden.compose import compose_run
from tests.train.tiny_run import VOCAB_SIZE, make_corpus
from train.config import RunConfig
from train.job import Job
from train.signals import StopRequest
from train.team import alone

ROOT = Path(__file__).resolve().parents[2]


def overrides(root: Path, *more: str) -> list[str]:
    """Return the command-line overrides of a job under `root`, whose corpus is root/corpus."""
    corpus = root / "corpus"
    if not corpus.exists():
        make_corpus(corpus)
    return [
        "recipe=smoke",
        "name=tiny",
        f"root={root}",
        "device=cpu",
        "precision=fp32",
        "logging.wandb=disabled",
        f"data.sources.stdlib.path={corpus}",
        f"data.validation={corpus}",
        f"data.tokenizer={corpus}/tokenizer.json",
        "data.prepare=null",
        "data.shuffle_window=256",
        f"model.vocab_size={VOCAB_SIZE}",
        "model.hidden_size=32",
        "model.num_layers=2",
        "model.dense_intermediate_size=48",
        "model.attention.num_heads=2",
        "model.attention.q_lora_rank=16",
        "model.attention.kv_lora_rank=16",
        "model.attention.qk_nope_head_dim=8",
        "model.attention.qk_rope_head_dim=8",
        "model.attention.v_head_dim=8",
        "model.moe.num_experts=8",
        "model.moe.top_k=2",
        "model.moe.intermediate_size=16",
        "parallel.microbatch_size=2",
        "checkpoint.every_steps=4",
        "stages.pretrain_4k.seq_len=16",
        "stages.pretrain_4k.num_tokens=640",
        "stages.pretrain_4k.batch={start: 2, end: 4, ramp_tokens: 200, multiple_of: 2}",
        "stages.pretrain_4k.lr.warmup_steps=2",
        "stages.extend_32k.seq_len=64",
        "stages.extend_32k.num_tokens=640",
        "stages.extend_32k.batch={start: 2, end: 2}",
        "stages.extend_32k.parallel.microbatch_size=1",
        "stages.extend_32k.yarn.original_length=16",
        "stages.extend_128k.seq_len=128",
        "stages.extend_128k.num_tokens=640",
        "stages.extend_128k.batch={start: 1, end: 1}",
        "stages.extend_128k.yarn.original_length=16",
        "evaluation.enabled=false",
        *more,
    ]


def train(root: Path, *more: str) -> Path:
    """Train the job in this process, without evaluation and report; return its run directory."""
    config = compose_run(*overrides(root, *more))
    job = job_of(config, root / config.name)
    with StopRequest() as stop:
        job.train(stop, Console(quiet=True))
    return root / config.name


def job_of(config: RunConfig, run_dir: Path) -> Job:
    """Open a job in this process alone."""
    return Job(config, run_dir, alone(torch.device("cpu")))


def command(root: Path, *more: str) -> list[str]:
    """Return the same job as a command."""
    return [sys.executable, "-m", "train", *overrides(root, *more)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command from the repository's root with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run without what differs between two runs of the same steps."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: value for key, value in record.items() if key != "timing"} for record in records]
