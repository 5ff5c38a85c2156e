"""A job of four processes that preflight examines in tests, each rank on a host of its own."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.preflight.command import examine
from launch.preflight.site import Outcome, Roster, Site
from launch.preflight.software import host_name
from parallel.groups import Group, Trace
from parallel.preflight.gather import gather_json
from parallel.process import Processes
from parallel.watchdog import Watchdog
from train.config_store import compose_run
from train.team import Team

SLOW_PERCENT = 300.0
"""A product of 10 ms that takes a second more is slow, also where other work takes most of the machine."""


def site_of(rank: int, world_size: int, overrides: list[str], **more: Any) -> Site:
    """Return what `command.main` would give the checks of this rank of a group that exists already."""
    trace, processes = Trace(), Processes(rank=rank, world_size=world_size)
    world = Group("world", range(world_size), rank=rank, trace=trace)
    watchdog = Watchdog(Processes(), trace=trace, timeout_s=1.0)
    team = Team(processes=processes, device=torch.device("cpu"), world=world, trace=trace, watchdog=watchdog)
    site = {
        "roster": Roster(gather_json(host_name(), world)),
        "agreed": True,
        "device_error": "",
        "slow_percent": SLOW_PERCENT,
        "max_skew_s": 1.0,
        "num_bytes": 1000,
    }
    return Site(team=team, config=compose_run(overrides), **(site | more))


def outcomes_of(site: Site) -> dict[str, Outcome]:
    """Run every check and return the outcomes by name."""
    found, axes = examine(site)
    assert axes or site.team.world.size == 1
    return {outcome.check: outcome for outcome in found}


class SlowProducts(TorchDispatchMode):
    """Makes every matrix product of this process take a second longer."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            time.sleep(1)
        return func(*args, **(kwargs or {}))


@contextmanager
def other_package(folder: Path, name: str, version: str) -> Iterator[None]:
    """Install another version of a package for this process, as far as its metadata go."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def everything_wrong(rank: int, folder: Path) -> dict[str, Outcome]:
    """Sabotage each rank in another way, and examine the job."""
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    own = folder / f"of-rank-{rank if rank == 2 else 'others'}"
    own.mkdir(exist_ok=True)
    os.chdir(own)  # root= is relative: rank 2 has a folder of its own
    skew = 60.0 if rank == 3 else 0.0
    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(other_package(folder / "site", "triton", "0.0.1"))
            stack.enter_context(SlowProducts())
        if rank == 3:
            send = Group.start_all_to_all
            # its network card sends something else than it was given
            Group.start_all_to_all = lambda self, x, *splits: send(self, x + 1, *splits)
        overrides = ["recipe=smoke", "parallel=pp2_ep2", "root=runs", "parallel.microbatch_size=7"]
        return outcomes_of(site_of(rank, 4, overrides, clock=lambda: time.time() + skew))
