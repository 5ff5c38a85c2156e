"""From a run to DeepSeek's open weights: config.json, safetensors shards, generation defaults, the tokenizer.

The FP32 weights of a checkpoint are read as they are needed, a shard at a time, and written as
train/hf/encoding.py says: in BF16, FP32, or DeepSeek's FP8 blocks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import Compute, Fp8Scales, PrecisionConfig
from model.hf import Role, hf_tensors, source_shapes
from model.hf_config import HfModel, to_hf_config
from train.checkpoints.coverage import problems
from train.checkpoints.manifest import CONFIG_FILE as RUN_CONFIG_FILE
from train.checkpoints.metadata import read_metadata
from train.checkpoints.storage import load_tensors
from train.config import RunConfig
from train.errors import RunError
from train.hf.encoding import Encoding, ExportType
from train.hf.folder import CONFIG_FILE, TOKENIZER_FILE, MtpWeights
from train.hf.fresh_folder import fresh_folder
from train.hf.progress import byte_progress
from train.hf.writer import plan_shards, write_shards
from train.load import Weights, find_checkpoint, stage_of
from train.stored_config import read_config


@dataclass(frozen=True, kw_only=True)
class CheckpointWeights:
    """The weights of one checkpoint under our names: the last ones, or their average."""

    folder: Path
    names: dict[str, str]  # our name -> name in the checkpoint
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: Path, config: RunConfig, weights: Weights) -> "CheckpointWeights":
        """Compare names and shapes with the configuration; RunError lists everything that differs."""
        biases = {t.source for t in hf_tensors(config.model) if t.role is Role.ROUTER_BIAS}
        shapes = source_shapes(config.model)
        # Router biases have no average: those of the last step go with the averaged weights.
        names = {name: f"{'model' if name in biases else weights}.{name}" for name in shapes}
        # Tensors of the right shape that take no memory.
        expected = {stored: torch.empty(()).expand(shapes[name]) for name, stored in names.items()}
        if found := problems(read_metadata(folder), expected, prefix=f"{weights}."):
            listed = "\n".join(f"  {problem}" for problem in found)
            raise RunError(f"{folder} does not hold the {weights} weights of its configuration:\n{listed}")
        return cls(folder=folder, names=names, shapes=shapes)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return some of the weights, FP32 on the CPU."""
        tensors = {name: torch.empty(self.shapes[name]) for name in names}
        stored = {self.names[name]: tensor for name, tensor in tensors.items()}
        load_tensors(self.folder, stored, prefix=None)
        return tensors


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write, and how."""

    dtype: ExportType | None = None
    """None: the type the run computes in, BF16 for FP16, whose range trained weights may leave."""
    fp8_scales: Fp8Scales | None = None
    """Of FP8 weights; None: those of the run, `precision.fp8_scales`."""
    shard_bytes: int = 5 * 10**9
    mtp: MtpWeights = MtpWeights.KEEP
    weights: Weights = Weights.MODEL


def export_weights(source: Path, target: Path, *, options: ExportOptions, console: Console) -> None:
    """Write the folder `target` from a run, RUN@STAGE or a checkpoint.

    RunError, before anything is written, when the checkpoint is not exactly the model of its configuration.
    """
    saved = find_checkpoint(source)
    run = read_config(saved.path / RUN_CONFIG_FILE)
    stage = run.stages.get(stage_of(saved))
    if stage is None:
        raise RunError(f"{saved.path} is not of a stage of its configuration; give the folder its name back")
    stored = CheckpointWeights.open(saved.path, run, options.weights)
    kept = replace(run.model, num_mtp_layers=0) if options.mtp is MtpWeights.DROP else run.model
    model = HfModel(config=kept, yarn=stage.yarn, seq_len=stage.seq_len)
    encoding = _encoding(options, run.precision)
    shards = plan_shards(hf_tensors(kept), encoding=encoding, shard_bytes=options.shard_bytes)
    with fresh_folder(target) as partial:
        total = sum(shard.num_bytes for shard in shards)
        with byte_progress(console, verb="writing", total_bytes=total) as advance:
            write_shards(
                partial,
                shards,
                encoding=encoding,
                read_sources=stored.read,
                written=lambda shard: advance(shard.file, shard.num_bytes),
            )
        _write_settings(partial, model, encoding=encoding, tokenizer=_tokenizer(run, console))


def _encoding(options: ExportOptions, precision: PrecisionConfig) -> Encoding:
    compute_type = ExportType.FP32 if precision.compute is Compute.fp32 else ExportType.BF16
    encoding = Encoding(
        type=options.dtype or compute_type, fp8_scales=options.fp8_scales or precision.fp8_scales
    )
    if options.fp8_scales and not encoding.fp8:
        raise RunError(
            f"--fp8-scales={options.fp8_scales} is about FP8 weights, and these are written in "
            f"{encoding.type}; add --dtype fp8, or leave --fp8-scales out"
        )
    return encoding


def _tokenizer(run: RunConfig, console: Console) -> Tokenizer | None:
    """Return the run's tokenizer; None, and a line that says why, where it cannot be this model's."""
    try:
        tokenizer = load_tokenizer(run.data.tokenizer)
    except DataError as error:  # the weights are worth having without it
        console.print(f"no tokenizer is written: {error}", markup=False, highlight=False, soft_wrap=True)
        return None
    if tokenizer.vocab_size <= run.model.vocab_size:
        return tokenizer
    console.print(
        f"no tokenizer is written: {run.data.tokenizer} has {tokenizer.vocab_size} tokens, the model "
        f"{run.model.vocab_size}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return None


def _write_settings(folder: Path, model: HfModel, *, encoding: Encoding, tokenizer: Tokenizer | None) -> None:
    name = str(encoding.dtype).removeprefix("torch.")
    eos_token_id = tokenizer.eos_id if tokenizer else None
    config = to_hf_config(model, dtype=name, eos_token_id=eos_token_id, fp8=encoding.fp8)
    _write_json(folder / CONFIG_FILE, config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer:
        tokenizer.save(folder / TOKENIZER_FILE)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.decode([tokenizer.eos_id]),
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
