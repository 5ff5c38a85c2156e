"""Weights & Biases: the records of a run as charts, online, or offline for a later `wandb sync`.

The run id is kept in the run directory, so that a run that is stopped and started again continues its
charts. Offline nothing leaves the machine: wandb then writes <run>/wandb/offline-run-…/run-….wandb only.
"""

import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from wandb.errors import Error as WandbError

from train.checkpoints.durable import replace_durably
from train.config import RunConfig, WandbMode
from train.errors import RunError, writing
from train.reporting.run_data import needle_score

MAX_BINS = 512
"""wandb refuses histograms of more bins than this."""


class WandbSink:
    """Logs scalars every step, expert loads as histograms when the record carries them, and evaluations.

    `mode` is ONLINE or OFFLINE (train/logs/wandb_login.py). Raises RunError when W&B cannot be reached though
    it must.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, mode: WandbMode) -> None:
        # wandb keeps its files in a folder of this name, and elsewhere when it cannot make it.
        with writing(run_dir / "wandb"):
            (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        online = mode is WandbMode.online
        if not online:
            # Without this wandb reports on itself to its makers, which offline means a DNS look-up a run.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._run = wandb.init(
                mode="online" if online else "offline",
                id=run_id(run_dir),
                # Offline there is no server whose run could be resumed; `wandb sync` joins equal ids.
                resume="allow" if online else None,
                project=config.logging.wandb_project,
                entity=config.logging.wandb_entity,
                name=config.name,
                dir=str(run_dir),
                config=asdict(config),
                # The progress bar redraws itself hundreds of times: keep it out of the captured log.
                settings=wandb.Settings(console="off", quiet=True),
            )
        except WandbError as error:
            raise RunError(
                f"W&B could not be reached ({error}); choose logging.wandb=offline and upload later with "
                "`wandb sync`, or logging.wandb=disabled"
            ) from error
        # Evaluations may come long after their step; their charts run over the tokens they were made at.
        self._run.define_metric("evaluation/*", step_metric="evaluation/tokens")
        self.place = self._run.url if online else str(run_dir / "wandb")
        """Where the charts are: an address, or the folder for `wandb sync`."""

    def write(self, record: dict[str, Any]) -> None:
        """Log one step. Steps that the run has already from before a crash are the same and are left out."""
        if record["step"] >= self._run.step:
            histograms = {
                f"router/load/{name}": load_histogram(load) for name, load in record.get("load", {}).items()
            }
            self._run.log({**scalars(record), **histograms}, step=record["step"])

    def evaluation(self, result: dict[str, Any]) -> None:
        """Log one evaluation, at the earliest step that still can be written."""
        self._run.log(evaluation_scalars(result), step=max(result["step"], self._run.step))

    def message(self, text: str) -> None:
        """Do nothing: the console has the messages."""

    def close(self) -> None:
        """Write what is pending and end this process's part of the run."""
        self._run.finish()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step record under the names of the charts, grouped by their first part."""
    values = {
        f"train/{name}": float(record[name])
        for name in ("loss", "balance_loss", "grad_norm", "skipped", "tokens", "seq_len", "batch_size")
    }
    values |= {f"train/mtp_loss/{depth}": loss for depth, loss in enumerate(record["mtp_loss"], start=1)}
    values |= {f"schedule/{name}": record[name] for name in ("lr", "mtp_weight", "bias_speed")}
    if "loss_scale" in record:
        values["train/loss_scale"] = record["loss_scale"]
    for quantity in ("max_vio", "load_entropy", "bias_range", "dead_experts"):
        values |= {f"router/{quantity}/{layer}": float(value) for layer, value in record[quantity].items()}
    for kind, quantities in record.get("fp8", {}).items():
        values |= {f"fp8/{kind}/{name}": value for name, value in quantities.items()}
    values |= {f"timing/{name}": value for name, value in record["timing"].items() if value is not None}
    return values


def evaluation_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation; before and after of a stage make one line of two points."""
    prefix = f"evaluation/{result['stage']}"
    values: dict[str, float] = {"evaluation/tokens": result["tokens"]}
    if held_out := result.get("held_out"):
        values[f"{prefix}/held_out_loss"] = held_out["loss"]
        values[f"{prefix}/below_unigram"] = held_out["unigram"] - held_out["loss"]
    for part in result.get("by_position") or []:
        values[f"{prefix}/loss_by_position/{part['from']}-{part['to']}"] = part["loss"]
    if (score := needle_score(result)) is not None:
        values[f"{prefix}/needle_score"] = score
    return {name: value for name, value in values.items() if value is not None}


def load_histogram(load: Iterable[int]) -> wandb.Histogram:
    """Return the load of one layer with the experts along the axis: over time, a map of expert by step."""
    load_E = np.asarray(list(load))
    num_experts = len(load_E)
    bins = np.histogram(
        np.arange(num_experts), bins=min(num_experts, MAX_BINS), range=(0, num_experts), weights=load_E
    )
    return wandb.Histogram(np_histogram=bins)


def run_id(run_dir: Path) -> str:
    """Return the W&B id of the run in `run_dir`; the first call chooses and stores it."""
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        with writing(path):
            replace_durably(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
