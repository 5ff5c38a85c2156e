"""`python -m launch calibrate cluster=CARD`: what share of the card's peaks does this machine reach?

Measures matrix products, attention and memory on every process, and, with several processes, the links inside
and between hosts; prints a file for configs/cluster/ and the same as overrides. Medians of five runs after
two that do not count; the sizes are printed. On a CPU, and where the card's peaks are null, the peaks are
measured too: plans for this very machine.

    python -m launch calibrate cluster=h800
    torchrun --nproc-per-node 8 -m launch calibrate cluster=h800      # the links inside the node as well
    srun … python -m launch calibrate cluster=h800_2048 --json        # between nodes too

Exit codes: 0 done, 2 the device is not the card that was named, or cannot be measured, 4 a process was lost.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.calibrate.card import Card, as_overrides, as_yaml, beyond_peak, efficiencies, measured_card
from launch.calibrate.compute import compute_rates
from launch.calibrate.links import link_rates
from launch.calibrate.rate import Rate, merged
from launch.options import add_measurement_options, command_parser
from launch.preflight.software import host_name
from parallel.cluster import ClusterConfig
from parallel.preflight.gather import gather_json
from parallel.process import processes_of_environment
from train.build import pick_device
from train.config_store import compose_run
from train.errors import RunError
from train.team import Team, assemble

GB = 1e9
TABLE_WIDTH = 120


def main(argv: list[str]) -> None:
    """Measure this machine and print what to paste; RunError where it is not the card that was named."""
    options = _parse(argv)
    _, _, local_rank = processes_of_environment(os.environ)
    config = compose_run(options.overrides)
    device = pick_device(config, local_rank=local_rank)
    with assemble(os.environ, device=device, timeout_s=options.timeout_s) as team:
        rates, hosts = measure(team)
        team.lead(lambda: _conclude(rates, hosts, config.cluster, team.device, as_text=not options.json))


def measure(team: Team) -> tuple[dict[str, Rate], list[str]]:
    """Return the rates of all ranks together, by name, and the host of each; all ranks call this together."""
    hosts = gather_json(host_name(), team.world)
    team.world.barrier()
    own = [*compute_rates(team.device), *link_rates(team, hosts)]
    told = gather_json([asdict(rate) for rate in own], team.world)
    return merged([[Rate(**rate) for rate in of_rank] for of_rank in told]), hosts


def card_of(
    rates: Mapping[str, Rate], cluster: ClusterConfig, device: torch.device, *, ranks_per_host: int
) -> tuple[Card, str | None]:
    """Return what to write into configs/cluster/, and the card that it inherits, if any."""
    if device.type == "cpu":
        memory_gb = _host_memory() / ranks_per_host / GB
        return measured_card(rates, name="this_cpu", memory_gb=memory_gb), None
    if cluster.peak_tflops is None:
        kind = torch.cuda.get_device_properties(device)
        name = re.sub(r"\W+", "_", kind.name).lower()
        return measured_card(rates, name=name, memory_gb=kind.total_memory / GB), None
    return {"efficiency": efficiencies(rates, cluster)}, cluster.name


def _conclude(
    rates: Mapping[str, Rate],
    hosts: list[str],
    cluster: ClusterConfig,
    device: torch.device,
    *,
    as_text: bool,
) -> None:
    card, inherits = card_of(rates, cluster, device, ranks_per_host=len(hosts) // len(set(hosts)))
    what = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, one process each"
    )
    comment = f"Measured on {len(hosts)} × {what}, torch {torch.__version__}."
    yaml, overrides = as_yaml(card, comment=comment, inherits=inherits), as_overrides(card)
    if as_text:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        console.print(_table(rates, comment))
        file = f"configs/cluster/{inherits or card['name']}{'_measured' if inherits else ''}.yaml"
        print(f"{file}:\n\n{yaml}\n\nor as overrides:\n\n{' '.join(overrides)}")
    else:
        print(json.dumps(_as_json(rates, card, yaml, overrides, comment), indent=1))
    if problems := beyond_peak(card["efficiency"], cluster) if inherits else []:
        raise RunError("this machine is not the card that was named:\n  " + "\n  ".join(problems))


def _as_json(
    rates: Mapping[str, Rate], card: Card, yaml: str, overrides: list[str], comment: str
) -> dict[str, object]:
    measured = {
        name: {"median": rate.median, "best": rate.best, "unit": f"{rate.unit}/s", "sizes": rate.what}
        for name, rate in rates.items()
    }
    return {"about": comment, "rates": measured, "cluster": card, "yaml": yaml, "overrides": overrides}


def _table(rates: Mapping[str, Rate], title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("rate", style="cyan", no_wrap=True)
    for name in ("median", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sizes", overflow="fold")
    for name, rate in rates.items():
        scale, unit = (1e12, "TFLOP/s") if rate.unit == "FLOP" else (GB, "GB/s")
        table.add_row(name, f"{rate.median / scale:.3g} {unit}", f"{rate.best / scale:.3g} {unit}", rate.what)
    return table


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "CPU")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("calibrate", __doc__)
    add_measurement_options(parser, timeout_s=300)
    return parser.parse_intermixed_args(argv)
