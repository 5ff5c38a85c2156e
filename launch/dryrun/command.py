"""`python -m launch dryrun OVERRIDES`: real training steps of a big job on one machine, without its memory.

Takes the overrides of `python -m train`. Every rank that differs from the others is run, or the one that is
asked for: how much memory it needs and when, its FLOPs, and what it sends.

    python -m launch dryrun recipe=deepseek_v3
    python -m launch dryrun recipe=deepseek_v3 --rank 1024 --stage extend_32k --json
    python -m launch dryrun recipe=v3_16b --imbalance 2

Exit codes: 0 the question is answered, whether it fits or not; 2 the request is wrong.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from launch.dryrun.advice import advise
from launch.dryrun.everyone import Alike, kinds_of_ranks, run_everyone, total_parameters
from launch.dryrun.job import RankReport, Request
from launch.dryrun.report import Findings, as_json, as_tables
from launch.dryrun.shortened import enough_microbatches
from launch.options import add_prediction_options, at_least, command_parser
from launch.tables import console
from model.config import Gemm
from parallel.config import Engine
from parallel.layout import coordinates
from parallel.pipeline.rules import schedule_problems
from parallel.rates import GIGA
from train.config import AdamKernel, RunConfig
from train.config_store import compose_run
from train.errors import RunError
from train.validate import check


def main(argv: list[str]) -> None:
    """Run dry what the command line describes and print what was found; RunError for a wrong request."""
    options = _parser().parse_intermixed_args(argv)
    request = request_of(options)
    kinds = kinds_of_ranks(request) if options.rank is None else [_one(request, options.rank)]
    reports = _run(request, kinds, workers=options.workers)
    findings = Findings(
        request=request,
        reports=reports,
        pp_ranks=[kind.pp_ranks for kind in kinds],
        total_parameters=total_parameters(kinds, reports) if options.rank is None else None,
    )
    if findings.fits is False:
        findings = replace(findings, advice=advise(request, reports))
    if options.json:
        print(as_json(findings))
    else:
        console().print(as_tables(findings))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dryrun", __doc__)
    add_prediction_options(parser)
    add = parser.add_argument
    add("--rank", type=_rank, metavar="R|all", help="default: all that differ")
    add("--stage", metavar="NAME", help="of the recipe; default: the first")
    add(
        "--microbatches",
        type=at_least(1, int),
        metavar="N",
        help="to run; default: the fewest that show the peak",
    )
    add(
        "--workers",
        type=at_least(1, int),
        default=os.cpu_count(),
        metavar="N",
        help="ranks to run at the same time (as many as there are cores)",
    )
    return parser


def _rank(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a rank nor all")
    return int(text)


def request_of(options: argparse.Namespace) -> Request:
    """Return the job that the options describe; RunError lists everything that is wrong with it."""
    config = compose_run(options.overrides)
    world_size = options.world_size or config.cluster.num_devices or 1
    check(config, world_size=world_size)
    stage = options.stage or next(iter(config.stages))
    if problems := [*_problems(config, stage), *_option_problems(options, config, world_size)]:
        raise RunError("\n".join(problems))
    whole = Request(
        config=config,
        stage=stage,
        world_size=world_size,
        num_microbatches=1,
        microbatches_of_step=1,
        imbalance=options.imbalance,
    )
    in_step = whole.stage_config.batch.end // (whole.layout.dp * whole.parallel.microbatch_size)
    count = options.microbatches or enough_microbatches(whole.parallel, in_step)
    if problems := _microbatch_problems(whole, count):
        raise RunError("\n".join(problems))
    return replace(whole, num_microbatches=count, microbatches_of_step=in_step)


def _problems(config: RunConfig, stage: str) -> Iterator[str]:
    """Yield what of the configuration cannot be run dry."""
    if stage not in config.stages:
        yield f"--stage={stage} is no stage of recipe={config.recipe}; use {', '.join(config.stages)}"
        return
    parallel = config.stages[stage].parallel or config.parallel
    if parallel.engine is not Engine.zero1:
        yield (
            f"stages.{stage}.parallel.engine={parallel.engine}: a dry run does not see the buffers and "
            "collectives that DeepSpeed makes itself, so gradients and optimizer state would be missing; use "
            "engine=zero1, or python -m launch plan"
        )
    if config.precision.gemm is Gemm.fp8_te:
        yield (
            "precision.gemm=fp8_te: Transformer Engine needs an accelerator even to be imported; use "
            "precision=fp8_triton, which keeps the same tensors in FP8"
        )
    if config.optimizer.kernel is AdamKernel.transformer_engine:
        yield (
            "optimizer.kernel=transformer_engine: it needs an accelerator even to be imported; use "
            "optimizer.kernel=torch, whose state is the same"
        )


def _option_problems(options: argparse.Namespace, config: RunConfig, world_size: int) -> Iterator[str]:
    if options.rank is not None and not 0 <= options.rank < world_size:
        yield f"--rank={options.rank} must lie in [0, {world_size}); use all, or {world_size - 1}"


def _microbatch_problems(request: Request, count: int) -> list[str]:
    p = request.parallel
    if p.pp == 1:
        return []
    found = schedule_problems(p.schedule, pp=p.pp, chunks=p.chunks, num_microbatches=count)
    return [f"--microbatches: {line}" for line in found]


def _one(request: Request, rank: int) -> Alike:
    return Alike(rank, (coordinates(request.layout.dense_axes, rank)["pp"],))


def _run(request: Request, kinds: list[Alike], *, workers: int) -> list[RankReport]:
    """Run one rank of each kind and say on stderr what is done."""
    progress = Console(stderr=True, highlight=False)

    def done(report: RankReport) -> None:
        progress.print(f"rank {report.rank}: {report.peak.total / GIGA:.1f} GB")

    try:
        return run_everyone(request, kinds, workers=workers, done=done)
    except ValueError as error:
        if request.imbalance == 1:
            raise
        raise RunError(f"--imbalance: {error}") from error
