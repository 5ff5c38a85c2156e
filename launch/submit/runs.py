"""The runs that overrides ask for: one, or one for each configuration of a sweep, checked as in training."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.submit.script import Task
from train.config import RunConfig
from train.config_store import SweepPoint, compose_run, expand_sweep
from train.errors import RunError
from train.validate import problems

MAX_NAME = 200
"""Longest name of a run; file systems allow 255 for a folder, and other files are named after it."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a command line asks for.

    folder: of the run, or of what belongs to a sweep as a whole; tasks: the runs; problems: broken rules.
    """

    folder: Path
    tasks: list[Task]
    problems: list[str]


def plan_runs(overrides: Sequence[str], *, sweep: bool, world_size: int) -> Runs:
    """Return the runs of `overrides` on world_size processes each.

    Runs of a sweep are named NAME-key=value-…, unless `name` and `root` already tell them apart. RunError
    where there is no configuration to check: one that cannot be composed, or a sweep that was not asked for.
    """
    points = expand_sweep(overrides)
    varied = points[0].swept
    if varied and not sweep:
        keys = ", ".join(_key(text) for text in varied)
        raise RunError(
            f"{keys}: several values make a sweep of {len(points)} runs; add --sweep to submit all"
        )
    if sweep and not varied:
        raise RunError("--sweep: no key has several values; write key=a,b, or leave --sweep out")
    configs = [compose_run(point.overrides) for point in points]
    tasks = _tasks(points, configs)
    found = [line for config in configs for line in problems(config, world_size=world_size)]
    return Runs(
        folder=_run_dir(configs[0], configs[0].name),
        tasks=tasks,
        problems=[*dict.fromkeys(found), *_folder_problems(tasks)],
    )


def _tasks(points: Sequence[SweepPoint], configs: Sequence[RunConfig]) -> list[Task]:
    own = [_run_dir(config, config.name) for config in configs]
    if len(set(own)) == len(own):
        return [
            Task(run_dir=folder, overrides=point.overrides) for folder, point in zip(own, points, strict=True)
        ]
    tasks = []
    for point, config in zip(points, configs, strict=True):
        name = "-".join([config.name, *(_label(text) for text in point.swept)])
        others = [text for text in point.overrides if _key(text) != "name"]
        tasks.append(Task(run_dir=_run_dir(config, name), overrides=[*others, f"name='{name}'"]))
    return tasks


def _folder_problems(tasks: Sequence[Task]) -> Iterator[str]:
    for folder, uses in Counter(task.run_dir for task in tasks).items():
        if uses > 1:
            yield f"{uses} runs of the sweep would share {folder}; give them names such as name=lr${{…}}"
        if len(folder.name) > MAX_NAME:
            yield f"name={folder.name} is longer than {MAX_NAME} characters; sweep fewer keys or set name="
        if not re.fullmatch(r"[\w./=+@,:~-]+", str(folder)):
            yield f"{folder}: Slurm takes no folder with spaces, quotes, '%' or '\\'; set root= and name="


def _run_dir(config: RunConfig, name: str) -> Path:
    return Path(config.root).resolve() / name


def _key(override: str) -> str:
    return override.partition("=")[0]


def _label(override: str) -> str:
    """Return the last word of the key, and the value, of an override, of characters that folders may have."""
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.=+-]", "_", f"{key.rpartition('.')[2].lstrip('+')}={value}")
