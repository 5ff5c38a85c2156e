"""`torchrun … -m launch preflight OVERRIDES`: is this job, on these machines, fit to start?

Takes the overrides of `python -m train` and joins its processes as training would, within --timeout-s. Every
check then runs, whatever the others found, and all problems are listed with their remedies.

    python -m launch preflight recipe=smoke
    torchrun --nproc-per-node 8 -m launch preflight recipe=v3_16b
    srun … python -m launch preflight recipe=deepseek_v3 --json > preflight.json

Exit codes: 0 fit, 2 something is wrong, 4 a process died or hung; one message says which, and in which check
(its step: 1 layout, 2 software, 3 clocks, 4 checkpoint folder, 5 devices, 6 products, 7 groups). torchrun
itself ends with 1 when one of them is not 0, and lists them.
"""

import argparse
import os
import sys
from dataclasses import replace

import torch
from rich.console import Console

from launch.options import add_measurement_options, at_least, command_parser
from launch.preflight.clocks import check_clocks
from launch.preflight.device import check_devices, usable_device
from launch.preflight.folder import check_folder
from launch.preflight.groups import Axis, check_groups
from launch.preflight.layout import check_layout
from launch.preflight.product import check_products
from launch.preflight.report import as_json, axis_table, outcome_table
from launch.preflight.site import Outcome, Roster, Site
from launch.preflight.software import check_software, host_name
from parallel.preflight.gather import gather_json
from parallel.process import processes_of_environment
from train.config import RunConfig
from train.config_store import compose_run
from train.errors import RunError
from train.stored_config import config_text
from train.team import Team, assemble

SLOW_PERCENT = {"cuda": 15.0, "cpu": 100.0}
"""The default of --slow-percent: on a CPU the processes of a machine share its cores, and times scatter."""

MESSAGE_MB = {"cuda": 64.0, "cpu": 1.0}
TABLE_WIDTH = 140
CPU = torch.device("cpu")

FIRST_CHECKS = (check_layout, check_software, check_clocks, check_folder, check_devices, check_products)


def main(argv: list[str]) -> None:
    """Examine the job that the command line describes; RunError lists everything that is wrong."""
    options = _parse(argv)
    _, _, local_rank = processes_of_environment(os.environ)
    config = compose_run(options.overrides)
    device, device_error = usable_device(config, local_rank=local_rank)
    with assemble(os.environ, device=device, timeout_s=options.timeout_s) as team:
        site = _site(team, config, device_error, options)
        outcomes, axes = examine(site)
        team.lead(lambda: _conclude(outcomes, axes, site.roster, as_text=not options.json))


def examine(site: Site) -> tuple[list[Outcome], list[Axis]]:
    """Run every check; all ranks call this together and get the same outcomes."""
    outcomes: list[Outcome] = []
    for check in FIRST_CHECKS:
        site.team.watchdog.step += 1
        outcomes.append(check(site))
        if outcomes[-1].broken:
            site = replace(site, team=replace(site.team, device=CPU))
    site.team.watchdog.step += 1
    groups, axes = check_groups(site)
    return [*outcomes, groups], axes


def _site(team: Team, config: RunConfig, device_error: str, options: argparse.Namespace) -> Site:
    mine = (host_name(), config_text(config), str(team.device.type))
    told = gather_json(mine, team.world)
    kinds = {kind for _, _, kind in told}
    if len(kinds) > 1:  # one rank is without an accelerator: what all can do is tried on the CPU
        team = replace(team, device=CPU)
    kind = team.device.type
    megabytes = MESSAGE_MB[kind] if options.message_mb is None else options.message_mb
    return Site(
        team=team,
        config=config,
        roster=Roster([host for host, _, _ in told]),
        agreed=len({text for _, text, _ in told}) == 1,
        device_error=device_error,
        slow_percent=SLOW_PERCENT[kind] if options.slow_percent is None else options.slow_percent,
        max_skew_s=options.max_skew_s,
        num_bytes=int(megabytes * 1e6),
    )


def _conclude(outcomes: list[Outcome], axes: list[Axis], roster: Roster, *, as_text: bool) -> None:
    if as_text:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        console.print(outcome_table(outcomes))
        if axes:
            console.print(axis_table(axes))
    else:
        print(as_json(outcomes, axes, roster.hosts))
    problems = [f"  {each.check}: {line}" for each in outcomes for line in each.problems]
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise RunError(f"preflight found {len(problems)} {noun}:\n" + "\n".join(problems))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("preflight", __doc__)
    add_measurement_options(parser, timeout_s=120)
    parser.add_argument(
        "--slow-percent",
        type=at_least(0, float),
        help=f"how much longer than the median a rank or group may take; "
        f"{SLOW_PERCENT['cuda']:g} on accelerators, {SLOW_PERCENT['cpu']:g} on CPUs",
    )
    parser.add_argument(
        "--max-skew-s", type=at_least(0, float), default=1.0, help="how far clocks may be apart (1)"
    )
    parser.add_argument(
        "--message-mb",
        type=at_least(0, float),
        help=f"buffer of a collective; {MESSAGE_MB['cuda']:g} on accelerators, {MESSAGE_MB['cpu']:g} on CPUs",
    )
    return parser.parse_intermixed_args(argv)
