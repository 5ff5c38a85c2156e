"""May this configuration go on from that checkpoint? Only if its tensors and its data are the same.

Anything else may change between two starts, and is named (`continuation`).
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from train.checkpoints.manifest import CONFIG_FILE, SavedCheckpoint
from train.config import RunConfig
from train.errors import RunError
from train.logs.console import quantity
from train.stages import source_weights
from train.stored_config import changed_settings

MAX_CHANGES = 8
"""How many changed settings are named; more are counted."""


def fingerprint(config: RunConfig, *, stage: str, data: str) -> dict[str, Any]:
    """Return what must stay the same while a run goes on: flat config paths with their values.

    `data` identifies the corpus and the order of its samples, under the seed that the run was started with: a
    seed that was changed is one difference and not two. Batch sizes, learning rates, token
    budgets, recomputation, precision and logging may change between two starts of a run.
    """
    current = config.stages[stage]
    kept = {
        "seed": config.seed,
        "model": asdict(config.model),
        "data": data,
        f"stages.{stage}.seq_len": current.seq_len,
        f"stages.{stage}.source_weights": _mixture(config, stage),
    }
    if config.optimizer.ema_decay is not None:
        kept["optimizer.ema_decay"] = "an average"  # its value may change, its presence adds tensors
    return dict(_flatten(kept, ""))


def check_resumable(*, saved: dict[str, Any], now: dict[str, Any], run_dir: str) -> None:
    """Raise RunError naming every difference between the two fingerprints."""
    changed = [
        f"  {path}: the run has {saved.get(path)!r}, the configuration now says {now.get(path)!r}"
        for path in sorted(saved.keys() | now.keys())
        if saved.get(path) != now.get(path)
    ]
    if changed:
        raise RunError(
            f"{run_dir} cannot be resumed, its model or data have changed:\n"
            + "\n".join(changed)
            + f"\nrestore the old values, or start another run with name=…; init_from={run_dir} keeps weights"
        )


def continuation(saved: SavedCheckpoint, config: RunConfig) -> str:
    """Return in one line where a run goes on, and with which settings other than those it was saved with."""
    step, tokens = saved.progress["step"], saved.progress["tokens"]
    line = f"continues from {saved.name} (step {step:,}, {quantity(tokens)} tokens)"
    if changed := changed_settings(saved.path / CONFIG_FILE, config):
        line += f" with {', '.join(changed[:MAX_CHANGES])}"
    if len(changed) > MAX_CHANGES:
        line += f" and {len(changed) - MAX_CHANGES} more changes"
    return line


def _mixture(config: RunConfig, stage: str) -> dict[str, float]:
    """Return the weights that order the samples of `stage`; that of an only source changes nothing."""
    weights = source_weights(config, config.stages[stage])
    return weights if len(weights) > 1 else {}


def _flatten(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
