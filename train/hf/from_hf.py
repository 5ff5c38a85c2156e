"""From DeepSeek's open weights to a run: a configuration, a tokenizer and a checkpoint at step 0.

The checkpoint holds weights and router biases only, in FP32: what `init_from` starts another run from, and
what evaluation, generation and export read. The model is assembled in files mapped into memory, so that one
larger than the machine can be converted; they take as much disk as the checkpoint until that is written.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.config import DataConfig
from model.config import Compute, ModelConfig, PrecisionConfig
from model.errors import WeightsError
from model.hf import HfTensor, hf_tensors, is_mtp_tensor, source_shapes
from model.hf_config import FP8_BLOCKS, HfModel, from_hf_config
from train.checkpoints.manager import CheckpointManager
from train.config import RunConfig, StageConfig
from train.hf.folder import CONFIG_FILE, TOKENIZER_FILE, HfFolder, MtpWeights, read_json
from train.hf.fresh_folder import fresh_folder
from train.hf.progress import byte_progress
from train.state import TrainState
from train.stored_config import config_text

STAGE = "imported"
"""The one stage of the configuration that is written; it carries the sequence length and YaRN."""

COMPUTE_TYPES = {"float32": Compute.fp32, "float16": Compute.fp16}
"""What a run computes in, by the type its file names; BF16 for every other, FP8 among them."""


def import_weights(source: Path, target: Path, *, mtp: MtpWeights, console: Console) -> None:
    """Write the run `target` from the folder `source`.

    WeightsError, before anything is written, when the folder is not exactly the model of its config.json.
    """
    values = read_json(source / CONFIG_FILE)
    model = from_hf_config(values, path=str(source / CONFIG_FILE))
    _check_quantization(values, path=source / CONFIG_FILE)
    folder = HfFolder.open(source)
    if mtp is MtpWeights.DROP:
        model = replace(model, config=replace(model.config, num_mtp_layers=0))
    else:
        _refuse_absent_mtp(folder, model.config)
    config, expected = model.config, hf_tensors(model.config)
    folder.check(expected, ignored=lambda name: mtp is MtpWeights.DROP and is_mtp_tensor(name, config))
    with fresh_folder(target) as partial:
        tokenizer = None
        if (source / TOKENIZER_FILE).exists():
            shutil.copyfile(source / TOKENIZER_FILE, partial / TOKENIZER_FILE)
            tokenizer = str(target / TOKENIZER_FILE)
        text = config_text(_run_config(model, values, target=target, tokenizer=tokenizer))
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        tensors = _read_all(folder, config, expected, scratch=partial / "scratch", console=console)
        checkpoints = CheckpointManager(partial / "checkpoints", keep_last=1, asynchronous=False)
        progress = TrainState(stage=STAGE).to_dict()
        checkpoints.save(f"{STAGE}-{0:08d}", tensors, progress, config_yaml=text, permanent=True)
        checkpoints.wait()
        del tensors
        shutil.rmtree(partial / "scratch")


def _read_all(
    folder: HfFolder, config: ModelConfig, expected: list[HfTensor], *, scratch: Path, console: Console
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, FP32; WeightsError when a second copy of a weight differs."""
    scratch.mkdir()
    tensors = {
        name: torch.from_file(str(scratch / name), shared=True, size=prod(shape)).view(shape)
        for name, shape in source_shapes(config).items()
    }
    total = sum(4 * prod(tensor.shape) for tensor in expected)
    differing: list[str] = []
    with byte_progress(console, verb="reading", total_bytes=total) as advance:
        for tensor in expected:
            if tensor.name not in folder.tensors:
                continue  # a copy that the file leaves out
            value = folder.read(tensor.name)
            ours = tensors[tensor.source]
            if not tensor.is_copy:
                (ours if tensor.expert is None else ours[tensor.expert]).copy_(value)
            elif not torch.equal(value, ours):
                differing.append(tensor.name)
            advance(folder.tensors[tensor.name].file.name, 4 * value.numel())
    if differing:
        raise WeightsError(
            f"{folder.path}: {', '.join(differing)} differ from the main model's embedding or head, which "
            "the MTP modules share here; use --without-mtp to drop the MTP modules"
        )
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _refuse_absent_mtp(folder: HfFolder, config: ModelConfig) -> None:
    """Configurations often promise MTP modules that their files do not have: say what to do about it."""
    if config.num_mtp_layers and not any(is_mtp_tensor(name, config) for name in folder.tensors):
        raise WeightsError(
            f"{folder.path / CONFIG_FILE}: num_nextn_predict_layers={config.num_mtp_layers}, but no "
            f"file has a tensor of model.layers.{config.num_layers}; use --without-mtp to do without them"
        )


def _check_quantization(values: Mapping[str, Any], *, path: Path) -> None:
    quantization = values.get("quantization_config")
    if quantization is None:
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    readable = FP8_BLOCKS["weight_block_size"]
    if method != "fp8" or list(block or []) != readable:
        raise WeightsError(
            f"{path}: quantization_config has quant_method={method!r}, weight_block_size={block}; only "
            f"'fp8' in blocks of {readable} can be read, or weights that are not quantised"
        )


def _run_config(
    model: HfModel, values: Mapping[str, Any], *, target: Path, tokenizer: str | None
) -> RunConfig:
    dtype = str(values.get("torch_dtype") or values.get("dtype"))
    return RunConfig(
        recipe=STAGE,
        name=target.name,
        root=str(target.parent),
        model=model.config,
        precision=PrecisionConfig(compute=COMPUTE_TYPES.get(dtype, Compute.bf16)),
        data=DataConfig(tokenizer=tokenizer) if tokenizer else DataConfig(),
        stages={STAGE: StageConfig(seq_len=model.seq_len, yarn=model.yarn)},
    )
