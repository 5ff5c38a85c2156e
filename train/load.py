"""A trained model from a run directory or a checkpoint folder, ready to evaluate, generate or export.

    runs/smoke                the newest intact checkpoint of a run
    runs/smoke@pretrain_4k    the end of one of its stages
    runs/smoke/checkpoints/pretrain_4k-00000512

A checkpoint stands alone: it holds the configuration it was trained with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from model.config import Compute
from model.transformer import Transformer
from train.checkpoints.manager import newest_intact
from train.checkpoints.manifest import CONFIG_FILE, MANIFEST_FILE, DamagedError, SavedCheckpoint, verify
from train.checkpoints.metadata import read_metadata
from train.checkpoints.storage import load_tensors
from train.config import RunConfig
from train.errors import RunError
from train.stored_config import read_config


class Weights(StrEnum):
    """Which weights of a checkpoint to load."""

    MODEL = "model"
    """The FP32 master weights of the last step."""
    EMA = "ema"
    """Their exponential moving average; router biases, which have none, are those of the last step."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, with what it was trained as."""

    config: RunConfig
    stage_name: str
    model: Transformer
    tokenizer: Tokenizer
    saved: SavedCheckpoint


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    compute: Compute | None = None,
    weights: Weights = Weights.MODEL,
) -> LoadedModel:
    """Build the model of a checkpoint, as its stage rotates positions, and fill it.

    Args:
        path: a run directory, RUN@STAGE, or a checkpoint folder.
        device: where the parameters are created.
        compute: type of the matrices; None for that of the configuration.
        weights: the last weights, or their average where one was kept.

    Raises:
        RunError: if there is no intact checkpoint, or its tensors are not those of its model.
        DataError: if its tokenizer cannot be read.
    """
    saved = find_checkpoint(path)
    config = read_config(saved.path / CONFIG_FILE)
    stage_name = stage_of(saved)
    if stage_name not in config.stages:
        raise RunError(
            f"{saved.path} is not of a stage of its configuration, which has {', '.join(config.stages)}; "
            "a checkpoint folder is called STAGE-STEP, give it its name back"
        )
    with torch.device(device):
        model = Transformer(
            config.model,
            yarn=config.stages[stage_name].yarn,
            compute=compute or config.precision.compute,
        )
    fill(model, saved.path, weights=weights)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model of "
            f"{saved.path} only {config.model.vocab_size}; give the tokenizer it was trained with"
        )
    return LoadedModel(
        config=config, stage_name=stage_name, model=model.eval(), tokenizer=tokenizer, saved=saved
    )


def find_checkpoint(path: Path) -> SavedCheckpoint:
    """Return the verified checkpoint that a path stands for. RunError when there is none."""
    if (path / "checkpoints").is_dir():
        return _of_run(path, stage=None)
    if path.is_dir():
        return _of_folder(path)
    run, at, stage = str(path).rpartition("@")
    if at and (Path(run) / "checkpoints").is_dir():
        return _of_run(Path(run), stage=stage)
    wrong = "is a file" if path.is_file() else "does not exist"
    raise RunError(f"{path} {wrong}; name a run directory, RUN@STAGE or a checkpoint folder")


def stage_of(saved: SavedCheckpoint) -> str:
    """Return the stage a checkpoint was saved in."""
    return saved.name.rpartition("-")[0]


def fill(model: Transformer, folder: Path, *, weights: Weights) -> None:
    """Copy a checkpoint's weights into a model. RunError unless every tensor of both is matched."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if weights is Weights.MODEL:
        load_tensors(folder, _named("model", state), prefix="model.")
        return
    parameters = {name: state[name] for name, _ in model.named_parameters()}
    if not any(name.startswith("ema.") for name in read_metadata(folder).state_dict_metadata):
        raise RunError(
            f"{folder} has no averaged weights (optimizer.ema_decay was null); load its model weights"
        )
    load_tensors(folder, _named("ema", parameters), prefix="ema.")
    buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
    load_tensors(folder, _named("model", buffers), prefix=None)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _of_run(run: Path, *, stage: str | None) -> SavedCheckpoint:
    saved = newest_intact(run / "checkpoints", stage=stage)
    if saved is None and stage is None:
        raise RunError(f"{run} has no checkpoint yet; train it first")
    if saved is None:
        raise RunError(f"{run} has no checkpoint of the end of stage {stage!r}; {_stages_on_disk(run)}")
    return saved


def _of_folder(path: Path) -> SavedCheckpoint:
    if not (path / MANIFEST_FILE).exists():
        raise RunError(
            f"{path} is no run directory (it has no checkpoints/) and no checkpoint (no {MANIFEST_FILE})"
        )
    try:
        return verify(path)
    except DamagedError as error:
        raise RunError(f"checkpoint {path} is damaged: {error}; use another one of its run") from error


def _stages_on_disk(run: Path) -> str:
    names = sorted(
        entry.name for entry in (run / "checkpoints").iterdir() if (entry / MANIFEST_FILE).exists()
    )
    return f"there is {', '.join(names)}" if names else "nothing has been saved yet"
