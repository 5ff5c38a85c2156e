"""From a run's configuration to what a plan is asked: the stages as tasks, or what makes them impossible."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass

from parallel.backend_rules import backend_problems
from parallel.checks import layout_problems
from parallel.config import ParallelConfig
from parallel.planner import Task
from parallel.rates import missing
from train.config import Moments, RunConfig, StageConfig
from train.errors import RunError
from train.schedule import batch_size_at

MOMENT_BYTES = {Moments.bf16: 2, Moments.fp32: 4}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One stage of a run on one cluster.

    steps: how many steps have each batch size; own: the layout as configured, and problems: what it breaks;
    fixed: fields of the layout that were given on the command line, which the search leaves alone.
    """

    name: str
    num_tokens: int
    steps: Counter[int]
    task: Task
    own: ParallelConfig
    problems: list[str]
    fixed: frozenset[str]


def questions(
    config: RunConfig, *, overrides: Iterable[str], world_size: int | None, imbalance: float = 1.0
) -> list[Question]:
    """Return a question for each stage.

    Args:
        config: the run.
        overrides: what the configuration was composed from; `parallel.key=value` fixes that key.
        world_size: devices; None for those of the cluster.
        imbalance: rows of the busiest device's experts over the mean.

    Raises:
        RunError: if the cluster or the model is not described well enough, with every problem.
    """
    devices = world_size if world_size is not None else config.cluster.num_devices
    found = [*_section_problems(config), *missing(config.cluster, config.precision)]
    if devices is None:
        found.append(
            "cluster.num_devices=null: say for how many devices; use --world-size N, or a cluster with a "
            "number such as cluster=h800_2048"
        )
    elif devices < 1:
        found.append(f"--world-size {devices} must be at least 1; use 8")
    if not config.stages:
        found.append("stages is empty; choose a recipe such as recipe=deepseek_v3")
    if found or devices is None:
        raise RunError("no plan can be made:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(found)))
    given = list(overrides)
    return [
        _question(config, name, stage, devices, _fixed(given, name), imbalance)
        for name, stage in config.stages.items()
    ]


def steps_by_size(stage: StageConfig) -> Counter[int]:
    """Return how many steps of a stage have each batch size, in the order in which they come."""
    steps: Counter[int] = Counter()
    tokens, ramp_end = 0, min(stage.batch.ramp_tokens, stage.num_tokens)
    while tokens < ramp_end:
        size = batch_size_at(stage.batch, tokens)
        steps[size] += 1
        tokens += size * stage.seq_len
    rest = max(0, stage.num_tokens - tokens)
    steps[stage.batch.end] += -(-rest // (stage.batch.end * stage.seq_len))
    return steps


def task_of(
    config: RunConfig,
    stage: StageConfig,
    *,
    world_size: int,
    batch_sizes: Iterable[int],
    imbalance: float,
) -> Task:
    """Return what a stage trains, and on what."""
    return Task(
        model=config.model,
        precision=config.precision,
        cluster=config.cluster,
        world_size=world_size,
        seq_len=stage.seq_len,
        batch_sizes=tuple(batch_sizes),
        moment_bytes=MOMENT_BYTES[config.optimizer.moments],
        imbalance=imbalance,
    )


def broken_rules(task: Task, parallel: ParallelConfig, *, path: str) -> list[str]:
    """Return what keeps a layout from running a task at all, whatever it needs of memory."""
    found = layout_problems(
        parallel,
        model=task.model,
        world_size=task.world_size,
        batch_sizes=task.batch_sizes,
        seq_len=task.seq_len,
        path=path,
    )
    return found + backend_problems(task.precision, parallel, task.model, path=path)


def _question(
    config: RunConfig, name: str, stage: StageConfig, devices: int, fixed: frozenset[str], imbalance: float
) -> Question:
    own = stage.parallel or config.parallel
    steps = steps_by_size(stage)
    task = task_of(config, stage, world_size=devices, batch_sizes=sorted(steps), imbalance=imbalance)
    return Question(
        name=name,
        num_tokens=stage.num_tokens,
        steps=steps,
        task=task,
        own=own,
        problems=broken_rules(task, own, path=f"stages.{name}.parallel"),
        fixed=fixed,
    )


def _fixed(overrides: Iterable[str], stage: str) -> frozenset[str]:
    """Return the fields of a stage's layout that overrides give."""
    names = set()
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        for prefix in ("parallel.", f"stages.{stage}.parallel."):
            if key.startswith(prefix):
                names.add(key.removeprefix(prefix))
    return frozenset(names)


def _section_problems(config: RunConfig) -> list[str]:
    """Return the broken rules of what a plan reads: not of data, logging and the like."""
    found = []
    for name in ("model", "precision", "optimizer", "cluster"):
        found += _within(getattr(config, name), f"{name}.")
    for name, stage in config.stages.items():
        found += [f"stages.{name}.{line}" for line in stage.problems()]
        found += [f"stages.{name}.batch.{line}" for line in stage.batch.problems()]
    return found


def _within(section: object, path: str) -> list[str]:
    """Return the broken rules of a section and of the sections inside it."""
    own = getattr(section, "problems", None)
    found = [f"{path}{line}" for line in own()] if own is not None else []
    if is_dataclass(section):
        for each in fields(section):
            found += _within(getattr(section, each.name), f"{path}{each.name}.")
    return found
