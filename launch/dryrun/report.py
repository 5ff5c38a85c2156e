"""What a dry run found, as tables of at most 120 columns and as JSON. A GB is 10^9 bytes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from launch.dryrun.advice import Advice
from launch.dryrun.job import Collectives, RankReport, Request
from launch.dryrun.memory import Kind
from launch.dryrun.shortened import enough_microbatches
from launch.tables import new_table
from parallel.rates import GIGA, TERA


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is told.

    pp_ranks: whom each report stands for; total_parameters: of the whole model, where all ranks were run.
    """

    request: Request
    reports: Sequence[RankReport]
    pp_ranks: Sequence[tuple[int, ...]]
    advice: Sequence[Advice] = ()
    total_parameters: int | None = None

    @property
    def fullest(self) -> RankReport:
        """Return the report of the rank that needs most memory."""
        return max(self.reports, key=lambda report: report.peak.total)

    @property
    def limit(self) -> float | None:
        """Return the bytes that a step may take on the cluster's devices; None where that is not known."""
        usable = self.request.config.cluster.usable_gb
        return None if usable is None else usable * GIGA

    @property
    def fits(self) -> bool | None:
        """Return whether all ranks that were run fit; None where that is not known."""
        return None if self.limit is None else self.fullest.peak.total <= self.limit


def as_tables(findings: Findings) -> RenderableType:
    """Return everything to print."""
    request, fullest = findings.request, findings.fullest
    return Group(
        f"{request.stage} on {request.world_size:,} × {request.config.cluster.name}: GB at a device's peak",
        _memory_table(findings),
        "Its peak and its work",
        _work_table(findings),
        f"What rank {fullest.rank} puts into collectives in a step",
        _collectives_table(fullest),
        *_sentences(findings),
    )


def as_json(findings: Findings) -> str:
    """Return everything as one JSON object."""
    request = findings.request
    ranks = [
        _rank_values(report) | {"stands_for_pp_ranks": list(pp_ranks)}
        for report, pp_ranks in zip(findings.reports, findings.pp_ranks, strict=True)
    ]
    values = {
        "stage": request.stage,
        "world_size": request.world_size,
        "microbatches_run": request.num_microbatches,
        "microbatches_of_step": request.microbatches_of_step,
        "imbalance": request.imbalance,
        "device": request.config.cluster.name,
        "memory_limit_bytes": findings.limit,
        "fits": findings.fits,
        "total_parameters": findings.total_parameters,
        "ranks": ranks,
        "advice": [asdict(each) for each in findings.advice],
    }
    return json.dumps(values, indent=2)


def _rank_values(report: RankReport) -> dict[str, Any]:
    values = asdict(report)
    values["parameters"] = sum(report.parameters.values())
    values["peak"] |= {"total": report.peak.total}
    return values | {"flops_per_step": report.flops_per_step}


def _memory_table(findings: Findings) -> Table:
    """Return a row for each rank: its memory by kind at the moment when it needs most."""
    table = new_table(
        left=("rank", "pp", "layers"),
        right=("weights", "grads", "optim", "activ", "temp", "comm", "peak"),
    )
    for report, pp_ranks in zip(findings.reports, findings.pp_ranks, strict=True):
        over = findings.limit is not None and report.peak.total > findings.limit
        table.add_row(
            str(report.rank),
            _span(pp_ranks),
            ", ".join(report.layers),
            *(f"{report.peak.by_kind[kind] / GIGA:.2f}" for kind in Kind),
            f"{report.peak.total / GIGA:.2f}",
            style="red" if over else None,
        )
    return table


def _work_table(findings: Findings) -> Table:
    """Return a row for each rank: when and where its peak is, and its FLOPs."""
    table = new_table(
        left=("rank", "peak while", "in module"),
        right=("TFLOP/microbatch", "TFLOP/step"),
    )
    for report in findings.reports:
        table.add_row(
            str(report.rank),
            report.peak.moment,
            report.peak.module or "-",
            f"{report.flops_per_microbatch / TERA:.3g}",
            f"{report.flops_per_step / TERA:,.4g}",
        )
    return table


def _collectives_table(report: RankReport) -> Table:
    table = new_table(
        left=("group", "operation", "repeated"),
        right=("calls", "GB"),
    )
    for each in sorted(report.collectives, key=_by_bytes):
        often = "per microbatch" if each.per_microbatch else "once"
        table.add_row(each.group, each.operation, often, f"{each.calls:,}", f"{each.num_bytes / GIGA:,.4g}")
    return table


def _by_bytes(each: Collectives) -> int:
    return -each.num_bytes


def _span(pp_ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, pp_ranks[:4])) + (", …" if len(pp_ranks) > 4 else "")


def _sentences(findings: Findings) -> Iterator[str]:
    """Yield what the tables mean."""
    request, fullest = findings.request, findings.fullest
    if request.num_microbatches < request.microbatches_of_step:
        enough = enough_microbatches(request.parallel, request.microbatches_of_step)
        shows = "as much memory at once" if request.num_microbatches >= enough else "less memory at once"
        yield (
            f"{request.num_microbatches} of {request.microbatches_of_step} microbatches were run, which hold "
            f"{shows}; FLOPs and bytes of the step are scaled up."
        )
    if findings.total_parameters is not None:
        yield f"All ranks together hold {findings.total_parameters:,} distinct parameters."
    if findings.limit is None:
        yield "Whether that fits is not known: choose a device with cluster=, such as cluster=h800."
        return
    cluster = request.config.cluster
    room = f"{cluster.memory_gb:g} GB of {cluster.name} less {cluster.memory_reserve_gb:g} GB for its runtime"
    verb = "fits" if findings.fits else "does not fit"
    yield f"Rank {fullest.rank} needs {fullest.peak.total / GIGA:.1f} GB at its peak, which {verb} {room}."
    if findings.fits:
        return
    if not findings.advice:
        yield "No change of one or two keys was found that would fit; python -m launch plan tries more."
        return
    yield "As dry runs of the fullest rank say, it would fit with"
    for each in findings.advice:
        time = f"{each.slowdown - 1:+.0%} of the step's time, estimated"
        yield f"  {' '.join(each.overrides)}   ({each.num_bytes / GIGA:.1f} GB, {time})"
