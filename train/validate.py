"""Refuse a bad configuration before anything starts: every problem at once, each with its path."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from parallel.backend_rules import backend_problems
from parallel.checks import layout_problems
from parallel.config import ParallelConfig
from train.config import BatchConfig, RunConfig, StageConfig
from train.errors import RunError
from train.machine import Machine
from train.requirements import kernel_problems, machine_problems, width_multiple
from train.stages import source_weights


def check(config: RunConfig, *, world_size: int = 1, machine: Machine | None = None) -> None:
    """Raise one RunError that lists every broken rule of `config` as `path.field=value rule; remedy`.

    world_size: the number of processes that are to run it; machine: where they run, if it is known.
    """
    found = problems(config, world_size=world_size, machine=machine)
    if found:
        noun = "problem" if len(found) == 1 else "problems"
        raise RunError(
            f"{len(found)} {noun} in the configuration:\n" + "\n".join(f"  {line}" for line in found)
        )


def problems(config: RunConfig, *, world_size: int = 1, machine: Machine | None = None) -> list[str]:
    """Return every broken rule: of each section, between sections, of the layouts, of the machine."""
    found = [
        *_section_problems(config, ""),
        *_run_problems(config),
        *_layout_problems(config, world_size=world_size, multiple=width_multiple(machine)),
    ]
    if machine is not None:
        found += machine_problems(config.precision, machine) + kernel_problems(config.optimizer, machine)
    return list(dict.fromkeys(found))


def seed_problems(name: str, seed: int) -> Iterator[str]:
    """Yield why `seed`, which the user calls `name`, cannot be one."""
    # NumPy takes none below 0 and torch 64 bits at most; steps and texts count on from it.
    if not 0 <= seed < 2**62:
        yield f"{name}={seed} must lie in [0, 2**62); use 0"


def _section_problems(section: object, path: str) -> Iterator[str]:
    own = getattr(section, "problems", None)
    if own is not None:
        yield from (f"{path}{line}" for line in own())
    for name, value in _children(section):
        yield from _section_problems(value, f"{path}{name}.")


def _children(section: object) -> Iterator[tuple[str, object]]:
    if isinstance(section, dict):
        yield from section.items()
    elif is_dataclass(section):
        for each in fields(section):
            value = getattr(section, each.name)
            if isinstance(section, StageConfig) and each.name == "parallel":
                continue  # mostly the run's own values: `_layout_problems` looks at both together
            if isinstance(value, dict) or is_dataclass(value):
                yield each.name, value


def _run_problems(config: RunConfig) -> Iterator[str]:
    if not config.stages:
        yield "stages is empty; give at least one stage, or choose a recipe such as recipe=smoke"
    if not config.data.sources:
        yield (
            "data.sources is empty; use data=corpus data.sources.corpus.path=FOLDER of prepared shards, "
            "or name sources in a file of configs/data"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        yield f"device={config.device} is unknown; use auto, cpu or cuda"
    if not config.name or "/" in config.name:
        yield f"name={config.name!r} must be one folder name; set root= for another place"
    yield from seed_problems("seed", config.seed)
    for name, stage in config.stages.items():
        if not re.fullmatch(r"[\w.-]+", name):  # it becomes the name of files, and follows @ in RUN@STAGE
            yield f"stages: {name!r} names files; use letters, digits, '_', '-' and '.'"
        yield from (f"stages.{name}.{line}" for line in _stage_problems(config, stage))


def _stage_problems(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    microbatch = (stage.parallel or config.parallel).microbatch_size
    batch = stage.batch
    for name in ("start", "end"):
        size = getattr(batch, name)
        if microbatch > 0 and size % microbatch:
            below, above = size // microbatch * microbatch, -(-size // microbatch) * microbatch
            yield (
                f"batch.{name}={size} must be a multiple of parallel.microbatch_size={microbatch}; "
                f"use {f'{below} or {above}' if below > 0 else above}"
            )
    if batch.start != batch.end and microbatch > 0 and batch.multiple_of % microbatch:
        yield (
            f"batch.multiple_of={batch.multiple_of} must be a multiple of "
            f"parallel.microbatch_size={microbatch}, so that every size on the ramp is; "
            f"use {-(-batch.multiple_of // microbatch) * microbatch}"
        )
    for source in stage.source_weights:
        if source not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            yield f"source_weights.{source} names no source of data.sources; known: {known}"
    if stage.source_weights and not any(weight > 0 for weight in source_weights(config, stage).values()):
        yield "source_weights leaves no source a positive weight; give at least one a weight above 0"
    yield from _lr_problems(stage)


def _layout_problems(config: RunConfig, *, world_size: int, multiple: int) -> Iterator[str]:
    """Yield what each stage's layout breaks; once, at the run's own path, what it breaks in every stage."""

    def broken(layout: ParallelConfig, stage: StageConfig) -> list[str]:
        found = layout_problems(
            layout,
            model=config.model,
            world_size=world_size,
            batch_sizes=_batch_sizes(stage.batch, microbatch=layout.microbatch_size),
            seq_len=stage.seq_len,
            path="parallel",
        )
        own = backend_problems(config.precision, layout, config.model, path="parallel", multiple=multiple)
        return found + own

    by_stage = {
        name: broken(stage.parallel or config.parallel, stage) for name, stage in config.stages.items()
    }
    everywhere = [set(found) for found in by_stage.values()]
    everywhere += [set(broken(config.parallel, stage)) for stage in config.stages.values()]
    shared = set.intersection(*everywhere) if everywhere else set()
    first = next(iter(by_stage.values()), [])
    yield from (line for line in first if line in shared)
    for name, found in by_stage.items():
        yield from (f"stages.{name}.{line}" for line in found if line not in shared)


def _batch_sizes(batch: BatchConfig, *, microbatch: int) -> list[int]:
    """Return the sizes that steps may have; none that `_stage_problems` or the section itself refuses."""
    if batch.problems() or microbatch < 1:
        return []
    low, high = sorted((batch.start, batch.end))
    sizes = [low] if low == high else range(low, high + 1, batch.multiple_of)
    return [size for size in sizes if size % microbatch == 0]


def _lr_problems(stage: StageConfig) -> Iterator[str]:
    previous = 0
    for i, piece in enumerate(stage.lr.pieces):
        last = i == len(stage.lr.pieces) - 1
        end = piece.until_tokens
        if piece.until_fraction is not None:
            end = round(piece.until_fraction * stage.num_tokens)
        if end is None and not last:
            yield f"lr.pieces[{i}] has no end, but a piece follows it; set until_tokens or until_fraction"
        if end is not None and end <= previous:
            yield f"lr.pieces[{i}] ends at {end} tokens, not after {previous}, where the piece before it ends"
        previous = end or previous
