"""What a model has learnt, measured on held-out text at a stage's length.

Three views: the held-out loss beside uniform, unigram and bigram predictions of the same tokens; the loss by
position (train/evaluation/position_loss.py); needle retrieval (train/evaluation/needle.py). Only the main
head is measured. The result depends on the weights, the corpus and the settings, on nothing random.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data.baselines import Baselines
from data.config import SourceConfig
from data.dataset import TrainingData
from data.heldout import HeldOut
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from train.build import pick_device
from train.checkpoints.durable import replace_durably
from train.config import RunConfig
from train.errors import RunError, exit_cleanly, writing
from train.evaluation.continuation import CachedScorer
from train.evaluation.needle import even_depths, halvings, needle_grid
from train.evaluation.position_loss import position_edges, position_losses
from train.evaluation.table import print_evaluation
from train.load import LoadedModel, load_model


def evaluate(
    model: Transformer,
    *,
    config: RunConfig,
    stage_name: str,
    tokenizer: Tokenizer,
    step: int,
    tokens: int,
    when: str,
) -> dict[str, Any]:
    """Measure `model`, as it stands, at the length of a stage; return the content of evaluations/*.json.

    The model's rotation setting and mode are left as they are found.

    Args:
        model: any device and compute type.
        config: of the run; `data` and `evaluation` say what is measured.
        stage_name: the stage whose length and data mix are used.
        tokenizer: of the run.
        step: of the checkpoint, passed on.
        tokens: seen by the checkpoint, passed on.
        when: "before" or "after" the stage, or "manual".

    Raises:
        DataError: when the held-out text is absent or shorter than one sequence.
    """
    seq_len = config.stages[stage_name].seq_len
    settings = config.evaluation
    held_out = HeldOut(config.data, seq_len=seq_len, extra=1, vocab_size=config.model.vocab_size)
    count = min(max(1, settings.num_tokens // seq_len), held_out.num_sequences)
    rows_NW = held_out.batch(0, count)  # W = S + 1
    baseline = Baselines(_training_data(config, stage_name)).evaluate(rows_NW)
    filler = rows_NW[np.arange(settings.needle_trials) % count, :seq_len]
    with _evaluation_mode(model):
        losses_S = position_losses(model, torch.from_numpy(rows_NW.copy()))
        needle = needle_grid(
            CachedScorer(model),
            filler_TL=torch.from_numpy(filler),
            tokenizer=tokenizer,
            lengths=halvings(seq_len, settings.needle_lengths),
            depths=even_depths(settings.needle_depths),
            seed=config.seed,
        )
    edges = position_edges(seq_len, [stage.seq_len for stage in config.stages.values()])
    return {
        "stage": stage_name,
        "step": step,
        "tokens": tokens,
        "seq_len": seq_len,
        "when": when,
        "held_out": {
            "loss": float(losses_S.mean()),
            "uniform": baseline.uniform,
            "unigram": baseline.unigram,
            "bigram": baseline.bigram,
            "num_tokens": baseline.num_tokens,
        },
        "by_position": [
            {"from": begin, "to": end, "loss": float(losses_S[begin:end].mean())}
            for begin, end in pairwise(edges)
        ],
        "needle": needle.as_json(),
    }


@contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    """Switch dropout off for the time of a measurement."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _training_data(config: RunConfig, stage_name: str) -> TrainingData:
    stage = config.stages[stage_name]
    weights = {name: source.weight for name, source in config.data.sources.items()}
    return TrainingData(
        config.data,
        seed=config.seed,
        seq_len=stage.seq_len,
        extra_tokens=1,
        weights=stage.source_weights or weights,
        vocab_size=config.model.vocab_size,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m train.evaluate`."""
    options = _parser().parse_args(arguments)
    with exit_cleanly():
        loaded = load_model(options.path, device=pick_device(RunConfig(device=options.device)))
        config, stage_name = _adjusted(loaded, options)
        loaded.model.set_yarn(config.stages[stage_name].yarn)
        progress = loaded.saved.progress
        result = evaluate(
            loaded.model,
            config=config,
            stage_name=stage_name,
            tokenizer=loaded.tokenizer,
            step=progress["step"],
            tokens=progress["tokens"],
            when="manual",
        )
        checkpoints = loaded.saved.path.parent
        if checkpoints.name == "checkpoints":
            _write(checkpoints.parent / "evaluations" / f"{stage_name}-manual.json", result)
        if options.json is not None:
            _write(options.json, result)
        print_evaluation(result, Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description="Measure a trained model.")
    parser.add_argument("path", type=Path, metavar="RUN_OR_CKPT", help="run, RUN@STAGE, or checkpoint folder")
    parser.add_argument(
        "--stage", help="measure at this stage's length, rotation and data (default: its own)"
    )
    parser.add_argument(
        "--corpus",
        metavar="FOLDER",
        help="a folder of data.prepare to take instead of the texts of the run: held-out text to measure, "
        "training text for the baselines",
    )
    parser.add_argument("--length", type=int, help="sequence length in place of the stage's")
    parser.add_argument("--tokens", type=int, help="held-out tokens in place of evaluation.num_tokens")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


def _adjusted(loaded: LoadedModel, options: argparse.Namespace) -> tuple[RunConfig, str]:
    """Return the run's configuration with the command's changes, and the stage to measure."""
    config = loaded.config
    stage_name = options.stage or loaded.stage_name
    if stage_name not in config.stages:
        raise RunError(
            f"--stage {stage_name} is not a stage of this run; use one of {', '.join(config.stages)}"
        )
    for name, value, smallest in (("--length", options.length, 2), ("--tokens", options.tokens, 1)):
        if value is not None and value < smallest:
            raise RunError(f"{name} {value} must be at least {smallest}")
    stage = config.stages[stage_name]
    if options.length is not None:
        stage = replace(stage, seq_len=options.length)
    if options.tokens is not None:
        config = replace(config, evaluation=replace(config.evaluation, num_tokens=options.tokens))
    if options.corpus is not None:
        stage = replace(stage, source_weights={})
        sources = {"corpus": SourceConfig(path=options.corpus)}
        config = replace(config, data=replace(config.data, sources=sources, validation=options.corpus))
    if config.data.validation is None:
        raise RunError("the run names no held-out text; use --corpus FOLDER, which data.prepare has written")
    return replace(config, stages=config.stages | {stage_name: stage}), stage_name


def _write(path: Path, result: dict[str, Any]) -> None:
    with writing(path):
        replace_durably(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
