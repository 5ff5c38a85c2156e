"""Which ranks differ, and a dry run of one of each kind.

Ranks of one pipeline rank do the same on tensors of the same shapes, whatever their place in data, tensor,
context and expert parallelism, because routing is balanced and causal work is spread in zigzag. So one of
each pipeline rank is run; and where pipeline ranks hold the same kinds of layers, and as many microbatches at
once, and put off as many weight gradients, one of these.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from launch.dryrun.job import RankReport, Request
from launch.dryrun.rank import run_rank
from parallel.layout import rank_at
from parallel.pipeline.in_flight import held_at_once
from parallel.placement import assign_layers, count_stages, stages_on_rank

EMBEDDING = "embed.weight"


@dataclass(frozen=True)
class Alike:
    """Pipeline ranks of which the first, as global rank `rank`, stands for all."""

    rank: int
    pp_ranks: tuple[int, ...]


def kinds_of_ranks(request: Request) -> list[Alike]:
    """Return one rank of each kind."""
    model, p, layout = request.config.model, request.parallel, request.layout
    num_stages = count_stages(p)
    layers = assign_layers(
        model, request.stage_config.seq_len, num_stages, layers_per_stage=p.layers_per_stage
    )
    sizes = {"pp": p.pp, "chunks": p.chunks, "num_microbatches": request.num_microbatches}
    held = held_at_once(p.schedule, **sizes) if p.pp > 1 else ((((1, 0),),),)
    kinds: dict[object, list[int]] = {}
    for pp_rank in range(p.pp):
        stages = stages_on_rank(p.schedule, p.pp, p.chunks, pp_rank)
        dense = [[layer < model.num_dense_layers for layer in layers[stage]] for stage in stages]
        ends = [(stage == 0, stage == num_stages - 1) for stage in stages]
        kinds.setdefault(repr((dense, ends, held[pp_rank])), []).append(pp_rank)
    axes = layout.dense_axes
    first = dict.fromkeys(axes, 0)
    return [Alike(rank_at(axes, first | {"pp": ranks[0]}), tuple(ranks)) for ranks in kinds.values()]


def run_everyone(
    request: Request, kinds: list[Alike], *, workers: int, done: Callable[[RankReport], None]
) -> list[RankReport]:
    """Run one rank of each kind dry, some at the same time; reports in the order of `kinds`.

    Args:
        request: see `run_rank`.
        kinds: of `kinds_of_ranks`.
        workers: processes to use.
        done: called with each report as it comes.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        running = {pool.submit(partial(run_rank, request), kind.rank): kind.rank for kind in kinds}
        reports = {}
        for each in as_completed(running):
            reports[running[each]] = each.result()
            done(reports[running[each]])
    return [reports[kind.rank] for kind in kinds]


def total_parameters(kinds: list[Alike], reports: list[RankReport]) -> int:
    """Return the parameters of the whole model, from what each kind of rank holds a share of.

    A table of embeddings that both ends of the pipeline hold is one.
    """
    of_all = sum(
        len(kind.pp_ranks) * sum(report.parameters.values())
        for kind, report in zip(kinds, reports, strict=True)
    )
    tables = [report.parameters[EMBEDDING] for report in reports if EMBEDDING in report.parameters]
    return of_all - sum(tables[1:])
