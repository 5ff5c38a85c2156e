"""What `python -m train` does with a valid configuration: data, stages, evaluation, report, closing table."""

from pathlib import Path

from rich.console import Console

from data.prepare import prepare
from model.kernels.allocator import keep_freed_memory
from train.config import RunConfig
from train.evaluation.stages import evaluate_stage
from train.job import Job
from train.report import write_report
from train.reporting.summary import closing_table
from train.run_lock import only_process
from train.signals import StopRequest
from train.validate import check


def run(config: RunConfig) -> None:
    """Run every part of the job that is not done yet; RunError or DataError for what people can mend."""
    check(config)
    keep_freed_memory()
    run_dir = Path(config.root) / config.name
    with only_process(run_dir):
        _run(config, run_dir, Console())


def _run(config: RunConfig, run_dir: Path, console: Console) -> None:
    if config.data.prepare:
        prepare(config.data.prepare, tokenizer=config.data.tokenizer)
    job = Job(config, run_dir)
    if not job.todo:
        last = list(config.stages)[-1]
        console.print(
            f"{run_dir}: all {len(config.stages)} stages are finished, nothing remains to train; "
            f"raise stages.{last}.num_tokens to go on",
            soft_wrap=True,
        )
    with StopRequest() as stop:
        job.train(stop, console)
    for stage in config.stages:
        evaluate_stage(config, run_dir, stage, console)
    report = write_report(run_dir)
    console.print(closing_table(run_dir))
    console.print(f"report: {report}", soft_wrap=True)
