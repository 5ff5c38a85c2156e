"""The configuration against the number of processes and this machine: what `python -m train` would refuse."""

from launch.preflight.site import Outcome, Site
from parallel.checks import layout_of
from parallel.config import Context, Dispatcher, ParallelConfig
from parallel.layout import Layout
from train.config import RunConfig
from train.machine import find_machine
from train.validate import problems


def check_layout(site: Site) -> Outcome:
    """List every broken rule of the configuration for this number of processes, on this machine."""
    world_size, config = site.team.world.size, site.config
    machine = find_machine(config.precision.gemm, config.optimizer.kernel, device=config.device)
    found = problems(config, world_size=world_size, machine=machine)
    noun = "process" if world_size == 1 else "processes"
    hosts = len(set(site.roster.hosts))
    where = f"{world_size} {noun} on {hosts} host{'s' if hosts > 1 else ''}"
    shown = "; ".join(_in_words(layout) for _, layout in layouts(config, world_size))
    return Outcome(check="layout", detail=f"{where}: {shown or 'no layout fits'}", problems=tuple(found))


def layouts(config: RunConfig, world_size: int) -> list[tuple[ParallelConfig, Layout]]:
    """Return the layouts of all stages with their configurations: each once, and only those that fit."""
    found: dict[tuple[Layout, Context, Dispatcher], ParallelConfig] = {}
    for stage in config.stages.values():
        parallel = stage.parallel or config.parallel
        if parallel.problems():
            continue
        try:
            layout = layout_of(parallel, world_size)
        except ValueError:  # `problems` of train/validate.py says why
            continue
        found.setdefault((layout, parallel.context, parallel.dispatcher), parallel)
    return [(parallel, layout) for (layout, _, _), parallel in found.items()]


def _in_words(layout: Layout) -> str:
    axes = (*layout.dense_axes.items(), ("ep", layout.ep))
    return " ".join(f"{name}={size}" for name, size in axes if size > 1) or "one process"
