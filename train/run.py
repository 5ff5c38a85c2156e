"""What `python -m train` does with a valid configuration: data, stages, evaluation, report, closing table.

Every process of the job runs this; the first one alone prints, prepares data, evaluates and reports.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from data.prepare import prepare
from model.kernels.allocator import keep_freed_memory
from parallel.process import processes_of_environment
from train.build import pick_device
from train.config import RunConfig
from train.evaluation.stages import evaluate_stage
from train.job import Job
from train.logs.output import outlive_readers
from train.machine import find_machine
from train.report import write_report
from train.reporting.summary import closing_table
from train.run_lock import only_process
from train.signals import StopRequest
from train.team import Team, assemble
from train.validate import check


def run(config: RunConfig) -> None:
    """Run every part of the job that is not done yet; RunError or DataError for what people can mend."""
    _, world_size, local_rank = processes_of_environment(os.environ)
    machine = find_machine(config.precision.gemm, config.optimizer.kernel, device=config.device)
    check(config, world_size=world_size, machine=machine)
    keep_freed_memory()
    run_dir = Path(config.root) / config.name
    device = pick_device(config, local_rank=local_rank)
    joined = assemble(os.environ, device=device, timeout_s=config.parallel.timeout_s)
    with outlive_readers(), joined as team, ExitStack() as held:
        team.lead(lambda: held.enter_context(only_process(run_dir)))
        _run(config, run_dir, team)


def _run(config: RunConfig, run_dir: Path, team: Team) -> None:
    console = Console(quiet=not team.leads)
    team.lead(lambda: _prepare(config))
    job = Job(config, run_dir, team)
    if not job.todo:
        last = list(config.stages)[-1]
        console.print(
            f"{run_dir}: all {len(config.stages)} stages are finished, nothing remains to train; "
            f"raise stages.{last}.num_tokens to go on",
            soft_wrap=True,
        )
    with StopRequest() as stop:
        job.train(stop, console)
    team.lead(lambda: _conclude(config, run_dir, console))


def _prepare(config: RunConfig) -> None:
    if config.data.prepare:
        prepare(config.data.prepare, tokenizer=config.data.tokenizer)


def _conclude(config: RunConfig, run_dir: Path, console: Console) -> None:
    for stage in config.stages:
        evaluate_stage(config, run_dir, stage, console)
    report = write_report(run_dir)
    console.print(closing_table(run_dir))
    console.print(f"report: {report}", soft_wrap=True)
