"""Measuring a stage at its own length: the model that entered it and the one that left it.

Both ("before" and "after") are read back from the permanent checkpoints of stage ends, so a crash loses no
measurement, and a measurement never disturbs training.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from train.checkpoints.durable import replace_durably
from train.config import RunConfig
from train.errors import writing
from train.evaluate import evaluate
from train.load import find_checkpoint, load_model
from train.stages import previous


def evaluate_stage(config: RunConfig, run_dir: Path, stage: str, console: Console) -> list[dict[str, Any]]:
    """Write evaluations/<stage>-{before,after}.json and return the results that were not there already.

    The first stage has no "before". A result made from the same checkpoint is kept. Raises RunError when
    one cannot be written; the next call measures it again.
    """
    if not config.evaluation.enabled or config.data.validation is None:
        return []
    new = []
    for when, source in (("before", previous(config, stage)), ("after", stage)):
        if source is None:
            continue
        path = run_dir / "evaluations" / f"{stage}-{when}.json"
        progress = find_checkpoint(Path(f"{run_dir}@{source}")).progress
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["step"] == progress["step"]:
            continue
        loaded = load_model(Path(f"{run_dir}@{source}"))
        console.print(f"evaluating at the length of {stage}: checkpoint {loaded.saved.name}", soft_wrap=True)
        result = evaluate(
            loaded.model,
            config=config,
            stage_name=stage,
            tokenizer=loaded.tokenizer,
            step=progress["step"],
            tokens=progress["tokens"],
            when=when,
        )
        with writing(path):
            replace_durably(path, json.dumps(result, indent=1))
        new.append(result)
    return new


def forget_later(run_dir: Path, *, step: int) -> None:
    """Remove the results of steps after `step`, whose checkpoints are lost: a run is about to repeat them."""
    for when in ("before", "after"):
        for path in (run_dir / "evaluations").glob(f"*-{when}.json"):
            if json.loads(path.read_text(encoding="utf-8"))["step"] > step:
                with writing(path):
                    path.unlink()
